"""Phases and networks as functions of the step number; the table of docs/training.md."""

import dataclasses
import pathlib

import numpy as np
import pytest

from experiments.configs import w14b
from lingbot_jax.config import ConfigError, build
from lingbot_jax.data.config import MixtureConfig
from lingbot_jax.training import curriculum
from lingbot_jax.training.config import OptimizerConfig, Phase, TaskConfig, TrainConfig
from tests.training import micro

PHASES = (
    Phase(end_step=10, frames=9, batch=8, shift=2.0, grad_accum_steps=2, mesh=micro.mesh()),
    Phase(end_step=15, frames=5, size=(16, 32), shift=4.0, path="long"),
    Phase(end_step=100),
)


def end(step: int, **fields) -> Phase:
    return Phase(end_step=step, **fields)


def config(**fields) -> TrainConfig:
    small = {"steps": 40, "curriculum": PHASES, "tasks": TaskConfig(max_conditioning_frames=2)}
    return micro.config(pathlib.Path("unused"), "run", **small | fields)


def test_phases_follow_each_other_and_take_what_they_leave_out_from_the_run():
    run = config()
    assert curriculum.spans(run) == [(0, 10), (10, 15), (15, 40)]
    assert [curriculum.phase_at(run, s) for s in (0, 9, 10, 14, 15, 39)] == [0, 0, 1, 1, 2, 2]
    first, second, third = run.phases()
    parts = first.optimizer.grad_accum_steps
    assert (first.data.frames, first.data.batch, first.flow.shift, parts) == (9, 8, 2.0, 2)
    assert (second.data.path, second.size, second.data.batch) == ("long", (16, 32), run.data.batch)
    assert third.data == dataclasses.replace(run.data, seed=2) and third.flow == run.flow
    assert config(curriculum=()).phases() == (config(curriculum=()),)


def test_a_phase_with_a_path_takes_it_alone_unless_it_has_a_mixture():
    more, other = (MixtureConfig(path=name, weight=2.0) for name in ("more", "other"))
    data = dataclasses.replace(config().data, weight=3.0, mixture=(more,))
    phases = (end(10), end(20, path="long"), end(30, path="long", mixture=(other,)), end(40, mixture=()))
    parts = [
        [(p.path, p.weight) for p in run.data.parts()]
        for run in config(data=data, curriculum=phases).phases()
    ]
    first = [(data.path, 3.0), ("more", 2.0)]
    assert parts == [first, [("long", 1.0)], [("long", 3.0), ("other", 2.0)], [(data.path, 1.0)]]


def test_a_run_without_a_curriculum_is_one_phase():
    assert config(curriculum=()).phases() == (config(curriculum=()),)
    assert curriculum.spans(config(curriculum=())) == [(0, 40)]


BLIND = micro.world_config(network=dataclasses.replace(micro.NETWORK, control="none"))


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"curriculum": (end(10), end(10))}, "curriculum = (10, 10): end_step must rise from phase to phase"),
        ({"curriculum": (end(10),)}, "curriculum = (10,): the last end_step must reach steps = 40"),
        (
            {"optimizer": OptimizerConfig(grad_accum_steps=3)},
            "optimizer.grad_accum_steps = 3: must divide data.batch",
        ),
        (
            {"curriculum": (end(40, grad_accum_steps=3),)},
            "curriculum[0].optimizer.grad_accum_steps = 3: must divide",
        ),
        (
            {"curriculum": (end(40, size=(16, 20)),)},
            "curriculum[0].size = (16, 20): must be (0, 0), or multiples of",
        ),
        (
            {"stage": "action", "world": BLIND},
            "world.networks.world.control = 'none': stage action trains adapters",
        ),
        ({"codec": None}, "codec = None: give the file"),
    ],
)
def test_runs_that_do_not_fit_are_refused(fields, line):
    with pytest.raises(ConfigError, match="^[^\n]+$") as error:
        config(**fields)
    assert line in str(error.value)


def test_crops_must_fit_the_codec_and_leave_something_to_predict():
    config(curriculum=(end(5, frames=9), end(40))).check_crops()
    with pytest.raises(ConfigError, match="curriculum\\[0\\].frames = 6: must be 4n \\+ 1"):
        config(curriculum=(end(40, frames=6),)).check_crops()
    with pytest.raises(ConfigError, match="must leave something to predict of 3 latent frames"):
        tasks = TaskConfig(max_conditioning_frames=3)
        config(curriculum=(end(5, frames=9), end(40)), tasks=tasks).check_crops()


def test_experts_share_the_steps_as_their_regions_share_the_noise_levels():
    both = micro.world_config("high", "low")
    run = config(world=both, steps=3000, curriculum=(end(1000, shift=2.0), end(3000, shift=8.0)))
    turns = [curriculum.network_at(run, s) for s in range(3000)]
    # The share of levels s = shift u / (1 + (shift - 1) u) at or above 0.7, u uniform: counted, not solved.
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    for (start, stop), shift in zip(curriculum.spans(run), (2.0, 8.0), strict=True):
        share = (shift * u / (1 + (shift - 1) * u) >= 0.7).mean()
        high = np.array([turn == "high" for turn in turns[start:stop]])
        assert abs(high.sum() - share * (stop - start)) <= 1
        gaps = np.diff(np.flatnonzero(high))
        assert gaps.max() - gaps.min() <= 1, "evenly spread"
    for name in ("high", "low"):
        assert curriculum.update_count(run, name) == turns.count(name)
    # A rate that reaches zero at another step counts the updates up to there.
    early = dataclasses.replace(run, optimizer=OptimizerConfig(decay="cosine", decay_steps=2000))
    for name in ("high", "low"):
        assert curriculum.update_count(early, name) == turns[:2000].count(name)
    assert curriculum.update_count(config(world=micro.world_config("low")), "low") == 40


def test_boundary_is_one_field_for_training_and_sampling():
    world = micro.world_config("high", "low")
    assert world.region("high")[0] == world.region("low")[1] == world.boundary == 0.7


def test_table_in_the_docs_is_that_of_the_config():
    """| 5 s | 81 | 21 | 32,760 | 5 | 21.9 % | 4 | 1 | 32,760 |"""
    run = build(TrainConfig, w14b.get_config("world").to_dict())
    rows = []
    for phase in run.phases():
        frames, seq = phase.data.frames, phase.mesh.seq
        latent = (frames - 1) // 4 + 1
        height, width = phase.size
        tokens = latent * (height // 16) * (width // 16)
        rows.append(
            f"| {(frames - 1) // 16} s | {frames} | {latent} | {tokens:,} | {phase.flow.shift:g} | "
            f"{100 * curriculum.high_share(phase):.1f} % | {phase.data.batch} | {seq} | {tokens // seq:,} |"
        )
    text = (micro.ROOT / "docs" / "training.md").read_text()
    for row in rows:
        assert row in text, "docs/training.md lacks\n" + "\n".join(rows)
