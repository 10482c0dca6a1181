"""Phases and experts as functions of the step number; the table of docs/training.md; resized windows."""

import dataclasses
import pathlib

import numpy as np
import pytest

from experiments.configs import w14b
from lingbot_jax.config import ConfigError, build
from lingbot_jax.parallel.mesh import MeshConfig
from lingbot_jax.training import curriculum
from lingbot_jax.training.config import FlowConfig, Phase, TrainConfig
from lingbot_jax.training.resize import resize_window
from tests.training import micro

PHASES = (
    Phase(10, frames=9, batch=8, shift=2.0, accumulate=2, mesh=MeshConfig(seq=1)),
    Phase(15, frames=5, size=(16, 32), shift=4.0, path="long"),
    Phase(100),
)


def config(**fields) -> TrainConfig:
    small = {"steps": 40, "curriculum": PHASES, "tasks": dataclasses.replace(micro.TaskConfig(), max_given=2)}
    return micro.config(pathlib.Path("unused"), "run", **small | fields)


def test_phases_follow_each_other_and_take_what_they_leave_out_from_the_run():
    run = config()
    assert curriculum.spans(run) == [(0, 10), (10, 15), (15, 40)]
    assert [curriculum.phase_at(run, s) for s in (0, 9, 10, 14, 15, 39)] == [0, 0, 1, 1, 2, 2]
    first, second, third = run.phases()
    assert (first.data.frames, first.data.batch, first.flow.shift, first.optimizer.accumulate) == (
        9,
        8,
        2.0,
        2,
    )
    assert (second.data.path, second.size, second.data.batch) == ("long", (16, 32), run.data.batch)
    assert third.data == dataclasses.replace(run.data, seed=2) and third.flow == run.flow
    assert config(curriculum=()).phases() == (config(curriculum=()),)
    assert curriculum.spans(config(curriculum=())) == [(0, 40)]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {"curriculum": (Phase(10), Phase(10))},
            "curriculum = (10, 10): until must rise from phase to phase",
        ),
        ({"curriculum": (Phase(10),)}, "curriculum = (10,): the last until must reach steps = 40"),
        ({"curriculum": (Phase(40, frames=6),)}, "curriculum[0]: data.frames = 6: must be 4n+1"),
        ({"curriculum": (Phase(5), Phase(40, batch=0))}, "curriculum[1]: data.batch = 0: must be positive"),
        ({"curriculum": (Phase(40, shift=-1.0),)}, "curriculum[0]: flow.shift = -1.0: must be positive"),
        ({"curriculum": (Phase(40, accumulate=3),)}, "optimizer.accumulate = 3: must divide data.batch = 4"),
        ({"curriculum": (Phase(40, size=(16, 20)),)}, "size = (16, 20): must be (0, 0), or multiples of 16"),
        ({"steps": 0}, "steps = 0: must be positive"),
        (
            {"stage": "action", "model": dataclasses.replace(micro.MODEL, control="none")},
            "model.control = 'none'",
        ),
    ],
)
def test_runs_that_do_not_fit_are_refused(fields, line):
    with pytest.raises(ConfigError, match="^[^\n]+$") as error:
        config(**fields)
    assert line in str(error.value)


def test_codec_must_fit_every_phase():
    codec = micro.LinearCodecConfig(channels=8)
    config(curriculum=PHASES[:1] + PHASES[2:]).check_codec(codec)
    with pytest.raises(ConfigError, match="must leave something to predict of 3 latent frames"):
        config(curriculum=(Phase(5, frames=9), Phase(40)), tasks=micro.TaskConfig(max_given=3)).check_codec(
            codec
        )


def test_experts_share_the_steps_as_their_regions_share_the_noise_levels():
    run = config(expert="both", steps=3000, curriculum=(Phase(1000, shift=2.0), Phase(3000, shift=8.0)))
    turns = [curriculum.expert_at(run, s) for s in range(3000)]
    # The share of levels s = shift u / (1 + (shift - 1) u) at or above 0.7, u uniform: counted, not solved.
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    for (start, end), shift in zip(curriculum.spans(run), (2.0, 8.0), strict=True):
        share = (shift * u / (1 + (shift - 1) * u) >= 0.7).mean()
        high = np.array([turn == "high" for turn in turns[start:end]])
        assert abs(high.sum() - share * (end - start)) <= 1
        gaps = np.diff(np.flatnonzero(high))
        assert gaps.max() - gaps.min() <= 1, "evenly spread"
    assert curriculum.expert_steps(run, "high") == turns.count("high")
    assert curriculum.expert_steps(run, "low") == turns.count("low")
    alone = curriculum.expert_runs(run, 1)
    assert {e: (c.expert, c.flow.shift, c.steps) for e, c in alone.items()} == {
        e: (e, 8.0, turns.count(e)) for e in ("high", "low")
    }
    assert curriculum.expert_runs(config(expert="low"), 0)["low"].steps == 40


def test_boundary_is_one_field_for_training_and_sampling():
    from lingbot_jax.training.state import abstract_model

    run = config(expert="both", flow=FlowConfig(boundary=0.7))
    assert run.flow.region("high")[0] == run.flow.region("low")[1] == abstract_model(run).boundary == 0.7


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


def test_resized_windows_keep_the_ray_of_every_pixel():
    rng = np.random.default_rng(0)
    ramp = np.broadcast_to(np.arange(40, dtype=np.float32)[None, :, None] * 4 + 20, (20, 40, 3))
    frames = np.broadcast_to(ramp, (2, 3, 20, 40, 3)).astype(np.uint8)
    intrinsics = np.tile(np.float32([30, 28, 20, 10]), (2, 3, 1))
    window = {"frames": frames, "intrinsics": intrinsics, "keys": rng.integers(0, 2, (2, 3, 8))}
    made = resize_window(window, (32, 32))
    assert made["frames"].shape == (2, 3, 32, 32, 3) and made["frames"].dtype == np.uint8
    # Scaled by 1.6 to 32 x 64, sixteen columns cut off on either side. The grey value tells the ray's direction:
    # a pixel centre at x in the new picture looks along (x - cx) / fx, and so did the one of that grey in the old.
    fx, fy, cx, cy = made["intrinsics"][0, 0]
    np.testing.assert_allclose([fx, fy, cx, cy], [48, 44.8, 16, 16])
    grey = made["frames"][0, 0, 16, :, 0].astype(np.float64)
    old_x = (grey - 20) / 4 + 0.5
    np.testing.assert_allclose((np.arange(32) + 0.5 - cx) / fx, (old_x - 20) / 30, atol=0.02)
    assert resize_window(window, (0, 0)) is window and resize_window(window, (20, 40)) is window
