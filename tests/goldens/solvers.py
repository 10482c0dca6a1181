"""Golden cases solver_unipc, solver_dpmpp, fewstep and fm_scheduler: schedules and samplers."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from lingbot_jax.diffusion import flow, schedule, solvers
from tests.golden import EXACT, Case, Tolerance

# 5e-6 is what 70 float32 steps cost against float64 ones (README of the cases).
LATENTS = Tolerance(atol=3e-5)
SIGMAS = Tolerance(atol=1e-6)


@jax.jit
def trajectory(noise: jax.Array, steps: solvers.Steps, k: jax.Array) -> jax.Array:
    """All latents of a solver on the velocity sin(k x + t / 1000)."""

    def body(state, row):
        state = solvers.step(row, state, jnp.sin(k * state.x + row.timestep / 1000))
        return state, state.x

    return jax.lax.scan(body, solvers.start(noise), steps)[1]


def _solver(case: Case, name: str):
    noise, k = jnp.asarray(case["noise"]), jnp.float32(case.config["k"])
    for prefix in case.prefixes():
        shift, n = re.fullmatch(r"shift([\d.]+)_steps(\d+)", prefix).groups()
        made = getattr(schedule, name)(int(n), float(shift))
        yield f"{prefix}/timesteps", made.timesteps, case[f"{prefix}/timesteps"], EXACT
        yield f"{prefix}/sigmas", made.sigmas, case[f"{prefix}/sigmas"], SIGMAS
        latents = trajectory(noise, getattr(solvers, name)(made), k)
        yield f"{prefix}/latents", np.concatenate([noise[None], latents]), case[f"{prefix}/latents"], LATENTS
        if name == "dpmpp":
            direct = schedule.unipc(int(n), float(shift))
            yield f"{prefix}/direct_timesteps", direct.timesteps, case[f"{prefix}/direct_timesteps"], EXACT
            yield f"{prefix}/direct_sigmas", direct.sigmas, case[f"{prefix}/direct_sigmas"], SIGMAS


def unipc(case: Case):
    yield from _solver(case, "unipc")


def dpmpp(case: Case):
    yield from _solver(case, "dpmpp")


def fewstep(case: Case):
    indices = tuple(int(i) for i in case["indices"])
    for prefix in case.prefixes():  # UniPC's and DPM++'s own schedules are the same table
        shift = float(prefix.partition("shift")[2])
        table, few = schedule.unipc(schedule.TRAIN_STEPS, shift), schedule.fast(shift, indices)
        looked_up = [schedule.lookup(table.timesteps, t) for t in few.timesteps]
        noised = flow.add_noise(
            jnp.asarray(case["x0"]), jnp.asarray(case["noise"]), jnp.asarray(few.renoise, jnp.float32)
        )
        for name, ours, tolerance in (
            ("timesteps_all", table.timesteps, EXACT),
            ("sigmas_all", table.sigmas, SIGMAS),
            ("timesteps", few.timesteps, EXACT),
            ("sigmas", table.sigmas[list(indices)], SIGMAS),
            ("lookup_index", looked_up, EXACT),
            ("lookup_sigma", few.renoise, SIGMAS),
            ("add_noise", noised, Tolerance(rtol=1e-6)),
        ):
            yield f"{prefix}/{name}", ours, case[f"{prefix}/{name}"], tolerance


def fm_scheduler(case: Case):
    x0, noise, velocity = (jnp.asarray(case[name]) for name in ("x0", "noise", "flow"))
    exact, close = Tolerance(rtol=1e-6), Tolerance(rtol=1e-5)
    for prefix in case.prefixes():
        shift = float(prefix.removeprefix("shift"))
        table = schedule.training_table(shift)
        sigma = jnp.asarray(table.sigma_at(case["t"]), jnp.float32)
        golden_noised = jnp.asarray(case[f"{prefix}/add_noise"])
        at = case[f"{prefix}/step_t"]
        now, after = table.sigma_at(at), table.next_sigma(at)
        ratio = after / now
        rows = solvers.Steps(  # one row of Euler per sample: the table made here spans unrelated levels
            at, now, np.tile([1.0, 0, 0, 0, 0], (len(at), 1)), np.stack([ratio, 1 - ratio, 0 * ratio], 1)
        )
        rows = solvers.Steps(*(jnp.asarray(a, jnp.float32) for a in rows))
        euler = jax.vmap(lambda row, x, v: solvers.step(row, solvers.start(x), v).x)(
            rows, golden_noised, velocity
        )
        levels = np.asarray(case["warp_in"])
        warped = np.zeros(levels.shape)  # 0 stays 0
        warped[levels > 0] = schedule.warped(shift, tuple(levels[levels > 0].tolist())).timesteps
        default = schedule.training_table(shift, 50, smallest=0.003 / 1.002, end_point=True)
        for name, ours, tolerance in (
            ("sigmas", table.sigmas, exact),
            ("timesteps", table.timesteps, exact),
            ("train_weights", table.weights, close),
            ("nearest_index", table.nearest(case["t"]), EXACT),
            ("weight_at_t", table.weights[table.nearest(case["t"])], close),
            ("add_noise", flow.add_noise(x0, noise, sigma), exact),
            ("target", flow.velocity_target(x0, noise), exact),
            ("flow_to_x0", flow.x0_from_velocity(golden_noised, velocity, sigma), exact),
            # Divided by a sigma as small as 0.005: rounding of the latent is amplified 200 times.
            ("x0_to_flow", (golden_noised - x0) / flow.over(sigma, x0), Tolerance(rtol=1e-4)),
            ("step_t", at, EXACT),
            ("step", euler, exact),
            ("warped_steps", warped, exact),
            ("default50_sigmas", default.sigmas, exact),
            ("default50_timesteps", default.timesteps, exact),
        ):
            yield f"{prefix}/{name}", ours, case[f"{prefix}/{name}"], tolerance


CASES = {"solver_unipc": unipc, "solver_dpmpp": dpmpp, "fewstep": fewstep, "fm_scheduler": fm_scheduler}
