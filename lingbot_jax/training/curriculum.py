"""Which phase and which expert a step belongs to (paper section 3.3.1): functions of the step number alone.

Training starts on short clips and ends on long ones. A phase (`config.Phase`) names how long its clips are, how
far the timesteps are shifted towards noise, how many clips a step takes and how the devices share them. Phases
follow each other inside one run; each has its own mesh, loader and compiled step. docs/training.md has the
table for the 14B world and the reasons.

A run with two experts trains one of them at each step. Out of every hundred steps the high-noise expert gets
as many as there are shifted noise levels at or above the boundary, evenly spread: so the two together see the
noise levels of one model, and it costs no randomness.
"""

import dataclasses
import math

from lingbot_jax.diffusion.flow import unshift_sigma
from lingbot_jax.training.config import EXPERTS, Expert, TrainConfig


def spans(config: TrainConfig) -> list[tuple[int, int]]:
    """First step of every phase, and the step it ends before. The last one ends with the run."""
    ends = [min(phase.until, config.steps) for phase in config.curriculum] or [config.steps]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def phase_at(config: TrainConfig, step: int) -> int:
    """Index of the phase of a step in 0..steps-1; after that, of the last phase."""
    reached = [i for i, (start, end) in enumerate(spans(config)) if start <= step and start < end]
    return reached[-1]


def high_share(config: TrainConfig) -> float:
    """The part of a phase's shifted noise levels that belongs to the high-noise expert."""
    return 1.0 - float(unshift_sigma(config.flow.boundary, config.flow.shift))


def expert_at(config: TrainConfig, step: int) -> Expert:
    """The expert that a step trains."""
    if config.expert != "both":
        return config.expert
    index = phase_at(config, step)
    share, done = high_share(config.phases()[index]), step - spans(config)[index][0]
    return "high" if math.floor((done + 1) * share) > math.floor(done * share) else "low"


def expert_steps(config: TrainConfig, expert: Expert) -> int:
    """How many steps of the run train an expert of two."""
    high = sum(
        math.floor((end - start) * high_share(phase))
        for phase, (start, end) in zip(config.phases(), spans(config), strict=True)
    )
    return high if expert == "high" else config.steps - high


def expert_runs(config: TrainConfig, phase: int) -> dict[Expert, TrainConfig]:
    """Each expert's training in a phase, as a run of that expert alone: what a step is compiled from.

    Its `steps` are those that train the expert, for schedules of the learning rate.
    """
    made = config.phases()[phase]
    if config.expert != "both":
        return {config.expert: made}
    steps = {expert: max(expert_steps(config, expert), 1) for expert in EXPERTS}
    return {e: dataclasses.replace(made, expert=e, steps=steps[e]) for e in EXPERTS}
