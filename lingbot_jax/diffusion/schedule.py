"""Noise schedules: which levels a sampler visits, and which timestep the network is told at each.

Everything here is float64 NumPy at trace time; the device sees small float32 tables. Three facts of the
published schedules decide whether trajectories agree with them:

- their integer timesteps are *truncated* products sigma * 1000 in float64 (399, not 400, where the product
  is 399.99999999999994);
- UniPC's first level is float32(0.999) before the shift, so it never reaches 1; DPM++'s is exactly 1;
- the fast model looks its levels up *by timestep value* in a table with repeated entries: the first occurrence is the
  level at which a velocity becomes x0, the second the one that x0 is re-noised to.
"""

import dataclasses

import numpy as np

from lingbot_jax.config import require
from lingbot_jax.diffusion.flow import TIMESTEPS, shift_sigma

TRAIN_STEPS = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """Levels of one trajectory.

    Attributes:
      sigmas: float64 [n+1], strictly decreasing noise levels; the last is 0.
      timesteps: float64 [n], what the network sees at sigmas[:n], in [0, 1000].
    """

    sigmas: np.ndarray
    timesteps: np.ndarray


def _check(steps: int, shift: float) -> None:
    require(steps >= 1, "steps", steps, "must be at least 1")
    require(shift > 0, "shift", shift, "must be positive")


def _truncated(sigmas: np.ndarray) -> np.ndarray:
    return (sigmas * TRAIN_STEPS).astype(np.int64).astype(np.float64)


def unipc(steps: int, shift: float) -> Schedule:
    """The published UniPC schedule; also what the published DPM++ builds when no levels are passed to it."""
    _check(steps, shift)
    largest = float(np.float32(1.0 - 1.0 / TRAIN_STEPS))
    sigmas = shift_sigma(np.linspace(largest, 0.0, steps + 1)[:-1], shift)
    # The published scheduler rounds the levels to float32 after the timesteps are made.
    return Schedule(np.append(sigmas, 0.0).astype(np.float32).astype(np.float64), _truncated(sigmas))


def dpmpp(steps: int, shift: float) -> Schedule:
    """The published DPM++ pipeline: shifted linspace(1, 0), first level exactly 1."""
    _check(steps, shift)
    sigmas = shift_sigma(np.linspace(1.0, 0.0, steps + 1)[:-1], shift)
    return Schedule(np.append(sigmas, 0.0).astype(np.float32).astype(np.float64), _truncated(sigmas))


def euler(steps: int, shift: float) -> Schedule:
    """Shifted linspace(1, 0) with exact (not truncated) timesteps 1000 sigma, as in training."""
    _check(steps, shift)
    sigmas = shift_sigma(np.linspace(1.0, 0.0, steps + 1), shift)
    return Schedule(sigmas, TIMESTEPS * sigmas[:-1])


@dataclasses.dataclass(frozen=True, eq=False)
class FewSteps:
    """Levels of the few-step sampler: predict x0, re-noise it with fresh noise to the next level.

    Attributes:
      timesteps: float64 [n], what the network sees.
      sigmas: float64 [n], the level at which the velocity is turned into x0.
      renoise: float64 [n], the level x0 is re-noised to before step i; renoise[0] belongs to the start
        latent, which is pure noise, and is not used.
    """

    timesteps: np.ndarray
    sigmas: np.ndarray
    renoise: np.ndarray


def lookup(timesteps: np.ndarray, value: float, occurrence: int = 1) -> int:
    """Index of a timestep value in a table with repeats.

    Args:
      occurrence: which of equals, from 0; the last where there are fewer.

    Raises:
      ValueError: the value is not in the table.
    """
    found = np.flatnonzero(timesteps == value)
    if not found.size:
        raise ValueError(f"timestep {value} is not in the schedule")
    return int(found[min(occurrence, found.size - 1)])


def fast(shift: float = 5.0, indices: tuple[int, ...] = (0, 179, 358, 679)) -> FewSteps:
    """The published fast models: timesteps at positions of a 1000-step schedule, both levels looked up by them."""
    table = unipc(TRAIN_STEPS, shift)
    require(all(0 <= i < TRAIN_STEPS for i in indices), "indices", indices, f"must be in [0, {TRAIN_STEPS})")
    timesteps = table.timesteps[np.asarray(indices)]
    x0, renoise = ([lookup(table.timesteps, t, which) for t in timesteps] for which in (0, 1))
    return FewSteps(timesteps, table.sigmas[x0], table.sigmas[renoise])


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingTable:
    """The table the published post-training draws levels from, and looks timesteps up in.

    Attributes:
      sigmas: float64 [n], decreasing. timesteps: 1000 sigmas.
      weights: float64 [n], a bell over timesteps, 0 at t = 1000, with mean 1: loss weights.
    """

    sigmas: np.ndarray
    timesteps: np.ndarray
    weights: np.ndarray

    def nearest(self, timestep: np.ndarray) -> np.ndarray:
        """Index of the nearest entry per timestep; the first of equals. t = 0 gives the last entry."""
        t = np.asarray(timestep, np.float32).reshape(-1, 1)
        found = np.abs(self.timesteps.astype(np.float32)[None] - t).argmin(1)
        return found.reshape(np.shape(timestep))

    def sigma_at(self, timestep: np.ndarray) -> np.ndarray:
        return self.sigmas[self.nearest(timestep)]

    def next_sigma(self, timestep: np.ndarray) -> np.ndarray:
        """The level after the nearest entry; 0 after the last."""
        return np.append(self.sigmas, 0.0)[self.nearest(timestep) + 1]


def training_table(
    shift: float, steps: int = TRAIN_STEPS, *, smallest: float = 0.0, end_point: bool = False
) -> TrainingTable:
    """Shifted linspace(1, smallest): `steps` entries, with `smallest` itself only if `end_point`."""
    _check(steps, shift)
    u = np.linspace(1.0, smallest, steps) if end_point else np.linspace(1.0, smallest, steps + 1)[:-1]
    sigmas = shift_sigma(u, shift)
    timesteps = TRAIN_STEPS * sigmas
    bell = np.exp(-2.0 * ((timesteps - steps / 2) / steps) ** 2)
    bell -= bell.min()
    return TrainingTable(sigmas, timesteps, bell * (steps / bell.sum()))


def warped(shift: float = 5.0, levels: tuple[int, ...] = (1000, 750, 500, 250)) -> FewSteps:
    """Self-Forcing's list of levels (counts of 1000) mapped through the shifted table; 0 stays 0."""
    require(all(0 < v <= TRAIN_STEPS for v in levels), "levels", levels, f"must be in (0, {TRAIN_STEPS}]")
    table = training_table(shift)
    at = TRAIN_STEPS - np.asarray(levels)
    return FewSteps(table.timesteps[at], table.sigmas[at], table.sigmas[at])
