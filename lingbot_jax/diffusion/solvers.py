"""Solvers of the probability-flow ODE: Euler, UniPC (order 2, bh2) and DPM++ 2M, as tables of coefficients.

Each of them is linear in the same short history: the corrected latent of the step before and the last two
predictions of the clean latent. So a solver is a table, made in float64 NumPy from a `Schedule`, and one
step is one function, the same for all. With x the latent handed to the network, m its x0 prediction there:

    x   <- corrector . (x, last, m_1, m_2, m)       refine x with what the network has just seen
    x'  =  predictor . (x, m, m_1)                  advance to the next level
    last, m_1, m_2 <- x, m, m_1

in terms of lambda = log((1 - sigma) / sigma) and h the difference of lambda over a step. Only UniPC corrects.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lingbot_jax.diffusion import schedule as schedules
from lingbot_jax.diffusion.flow import x0_from_velocity
from lingbot_jax.diffusion.schedule import Schedule

SolverName = Literal["euler", "unipc", "dpmpp"]


class Steps(NamedTuple):
    """One row per step (a pytree of arrays with leading axis s, which lax.scan walks).

    Attributes:
      timestep: [s] what the network sees. sigma: [s] the noise level there.
      corrector: [s 5] weights of x, last, m_1, m_2, m. predictor: [s 3] weights of x, m, m_1.
    """

    timestep: np.ndarray
    sigma: np.ndarray
    corrector: np.ndarray
    predictor: np.ndarray

    def rows(self, start: int, stop: int) -> "Steps":
        return Steps(*(a[start:stop] for a in self))


class State(NamedTuple):
    """What a trajectory carries: the latent and its history (all of the latent's shape, float32)."""

    x: Float[Array, "*latents"]
    last: Float[Array, "*latents"]
    m_1: Float[Array, "*latents"]
    m_2: Float[Array, "*latents"]


def _lambda(sigmas: np.ndarray) -> np.ndarray:
    """Half log signal-to-noise ratio; -inf at sigma 1 and +inf at sigma 0, on purpose."""
    with np.errstate(divide="ignore"):
        return np.log1p(-sigmas) - np.log(sigmas)


def _steps(schedule: Schedule, corrector: np.ndarray, predictor: np.ndarray) -> Steps:
    tables = (schedule.timesteps, schedule.sigmas[:-1], corrector, predictor)
    if not all(np.isfinite(a).all() for a in tables):
        raise ValueError(f"the schedule {schedule.sigmas} gives coefficients that are not finite")
    return Steps(*(np.asarray(a, np.float32) for a in tables))


def _identity(steps: int) -> np.ndarray:
    """The corrector that leaves x alone."""
    return np.tile([1.0, 0.0, 0.0, 0.0, 0.0], (steps, 1))


def euler(schedule: Schedule) -> Steps:
    """x' = x + (s' - s) v, written with the x0 prediction m: x' = (s'/s) x + (1 - s'/s) m."""
    ratio = schedule.sigmas[1:] / schedule.sigmas[:-1]
    n = ratio.size
    return _steps(schedule, _identity(n), np.stack([ratio, 1 - ratio, np.zeros(n)], 1))


def dpmpp(schedule: Schedule) -> Steps:
    """DPM-Solver++ 2M (midpoint), first order at the first and last step."""
    s, lam = schedule.sigmas, _lambda(schedule.sigmas)
    n = s.size - 1
    rows = np.zeros((n, 3))
    for i in range(n):
        h = lam[i + 1] - lam[i]
        gain = (1 - s[i + 1]) * -np.expm1(-h)  # h = inf at both ends: the whole step goes to m
        rows[i] = s[i + 1] / s[i], gain, 0.0
        if 0 < i < n - 1:
            inverse_r = h / (lam[i] - lam[i - 1])  # 0 after a first level of exactly 1
            rows[i, 1:] = gain * (1 + 0.5 * inverse_r), -gain * 0.5 * inverse_r
    return _steps(schedule, _identity(n), rows)


def unipc(schedule: Schedule) -> Steps:
    """UniPC of order 2 with B(h) = e^h - 1 ("bh2"), order 1 at the first and last prediction."""
    s, lam = schedule.sigmas, _lambda(schedule.sigmas)
    n = s.size - 1
    corrector, predictor = _identity(n), np.zeros((n, 3))
    for i in range(n):
        h = lam[i + 1] - lam[i]
        gain = (1 - s[i + 1]) * -np.expm1(-h)
        predictor[i] = s[i + 1] / s[i], gain, 0.0
        if 0 < i < n - 1:
            inverse_r = h / (lam[i] - lam[i - 1])
            predictor[i, 1:] = gain * (1 + 0.5 * inverse_r), -gain * 0.5 * inverse_r
    for i in range(1, n):  # corrects the step i-1 -> i, of the order that predicted it
        h = lam[i] - lam[i - 1]
        gain = (1 - s[i]) * -np.expm1(-h)
        if i == 1:
            old, new = 0.0, 0.5
            r = 1.0
        else:
            r = (lam[i - 2] - lam[i - 1]) / h
            phi_1 = np.expm1(-h)
            phi_2 = phi_1 / -h - 1
            phi_3 = phi_2 / -h - 0.5
            old, new = np.linalg.solve([[1.0, 1.0], [r, 1.0]], [phi_2 / phi_1, 2 * phi_3 / phi_1])
        corrector[i] = 0.0, s[i] / s[i - 1], gain * (1 - old / r - new), gain * old / r, gain * new
    return _steps(schedule, corrector, predictor)


def make(name: SolverName, steps: int, shift: float) -> Steps:
    """The table of a named solver on its own published schedule."""
    solver = {"euler": euler, "unipc": unipc, "dpmpp": dpmpp}[name]
    schedule = {"euler": schedules.euler, "unipc": schedules.unipc, "dpmpp": schedules.dpmpp}[name]
    return solver(schedule(steps, shift))


def start(noise: Float[Array, "*latents"]) -> State:
    """The state at the first level; the history starts at zero, with weight zero."""
    return State(noise, *(jnp.zeros_like(noise) for _ in range(3)))


def step(row: Steps, state: State, velocity: Float[Array, "*latents"]) -> State:
    """Advances one level. `row` is one row of `Steps`, `velocity` the network's output at state.x."""
    m = x0_from_velocity(state.x, velocity, row.sigma)
    c, p = row.corrector, row.predictor
    x = c[0] * state.x + c[1] * state.last + c[2] * state.m_1 + c[3] * state.m_2 + c[4] * m
    return State(p[0] * x + p[1] * m + p[2] * state.m_1, x, m, state.m_1)


def run(
    steps: Steps,
    state: State,
    velocity: Callable[[Float[Array, "*latents"], Float[Array, ""]], Float[Array, "*latents"]],
) -> State:
    """Runs all rows with lax.scan: `velocity(x, timestep)` is traced once."""

    def body(state: State, row: Steps) -> tuple[State, None]:
        return step(row, state, velocity(state.x, row.timestep)), None

    return jax.lax.scan(body, state, jax.tree.map(jnp.asarray, steps))[0]
