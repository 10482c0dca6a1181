"""Which phase and which network a step belongs to (paper section 3.3.1): functions of the step number alone.

Training starts on short clips and ends on long ones. A phase (`config.Phase`) names how long its clips are, how
far the timesteps are shifted towards noise, how many clips a step takes and how the devices share them. Phases
follow each other inside one run; each has its own mesh and compiled step. docs/training.md has the table for the
14B world and the reasons.

A run with both noise experts trains one of them at each step. Out of every hundred steps the high-noise expert gets
as many as there are shifted noise levels at or above the boundary, evenly spread: so the two together see the
noise levels of one model, and it costs no randomness.
"""

import math

from lingbot_jax.diffusion.flow import unshift_sigma
from lingbot_jax.training.config import TrainConfig


def spans(config: TrainConfig) -> list[tuple[int, int]]:
    """First step of every phase, and the step it ends before. The last one ends with the run."""
    ends = [min(phase.end_step, config.steps) for phase in config.curriculum] or [config.steps]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def phase_at(config: TrainConfig, step: int) -> int:
    """Index of the phase of a step in 0..steps-1; after that, of the last phase."""
    reached = [i for i, (start, end) in enumerate(spans(config)) if start <= step and start < end]
    return reached[-1]


def high_share(config: TrainConfig) -> float:
    """The part of a phase's shifted noise levels that belongs to the high-noise expert."""
    return 1.0 - float(unshift_sigma(config.world.boundary, config.flow.shift))


def network_at(config: TrainConfig, step: int) -> str:
    """The network that a step of stage `world` or `action` trains."""
    if not config.experts:
        return next(iter(config.world.networks))
    index = phase_at(config, step)
    share, done = high_share(config.phases()[index]), step - spans(config)[index][0]
    return "high" if math.floor((done + 1) * share) > math.floor(done * share) else "low"


def update_count(config: TrainConfig, network: str) -> int:
    """How many steps train a network until `steps`, or until the rate is zero where the config says when."""
    horizon = config.optimizer.decay_steps or config.steps
    if not config.experts:
        return horizon
    last = len(spans(config)) - 1
    high = 0
    for i, (phase, (start, end)) in enumerate(zip(config.phases(), spans(config), strict=True)):
        end = horizon if i == last else min(end, horizon)
        high += math.floor(max(end - start, 0) * high_share(phase))
    return max(high if network == "high" else horizon - high, 1)
