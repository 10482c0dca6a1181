"""A world measured on a data set: at the run's own size, with every clip's own noise, and as the training loop asks."""

import dataclasses

import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.control import keyboard
from lingbot_jax.data.config import DataConfig
from lingbot_jax.data.records import shard_name, write_shard
from lingbot_jax.data.schema import encode
from lingbot_jax.evaluation import suite
from lingbot_jax.evaluation.video import clip_psnr
from lingbot_jax.rollout.sample import sample_clips
from lingbot_jax.training.config import TrainConfig, ValidationConfig
from lingbot_jax.worlds.clips import prepare
from tests.data.clips import make_clip
from tests.rollout.worlds import TINY_WORLD, world

FRAMES, SIZE = 9, (32, 64)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    """Five clips of 40 x 64 with noise for pictures; nothing is pressed in the first."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    blobs = []
    for i in range(5):
        clip = make_clip(i, FRAMES, size=(40, 64), split="held_out")
        frames = rng.integers(0, 256, clip.frames.shape, np.uint8)
        keys = clip.keys * (i > 0)
        clip = dataclasses.replace(clip, frames=frames, keys=keys, c2w=keyboard.integrate(keys))
        blobs.append(encode(clip))
    write_shard(folder / shard_name("held_out", 0, 1), blobs, "uncompressed")
    return DataConfig(path=str(folder), frames=FRAMES, batch=3)


def test_clips_are_those_that_move_and_as_large_as_asked_for(data):
    clips = suite.held_out_clips(data, 4, SIZE)
    assert clips["frames"].shape == (4, FRAMES, *SIZE, 3) and clips["keys"][:, 1:].any((1, 2)).all()
    stored = suite.held_out_clips(data, 4)
    np.testing.assert_array_equal(clips["frames"], stored["frames"][:, :, 4:36])  # cut about the centre
    np.testing.assert_allclose(clips["intrinsics"][..., 3], stored["intrinsics"][..., 3] - 4)
    with pytest.raises(
        ConfigError, match="config.clips = 5: .* has 4 held-out clips of 9 frames with movement"
    ):
        suite.held_out_clips(data, 5)


def test_numbers_are_those_of_the_videos(data):
    """Against clips that are sampled one by one: nothing depends on the batch, and the other keys are another's."""
    clips = suite.held_out_clips(data, 3, SIZE)
    measured = suite.evaluate_world(world(), clips, batch=2, seed=4)  # the second batch is filled up
    assert all(video.shape == (3, FRAMES, *SIZE, 3) for video in measured.videos.values())

    def alone(i: int, keys_of: int) -> np.ndarray:
        row = {n: clips[n][keys_of : keys_of + 1] for n in ("keys", "c2w", "intrinsics")}
        row["frames"] = clips["frames"][i : i + 1]
        prepared = prepare(TINY_WORLD, world().text, row, np.ones(1, int), [str(clips["static"][i])])
        video = sample_clips(world(), prepared, seed=4, indices=[i])
        return np.round((np.clip(video, -1, 1) + 1) * 127.5)

    for name, shift in (("true_keys", 0), ("other_keys", 1)):
        expected = np.concatenate([alone(i, (i - shift) % 3) for i in range(3)])
        assert np.abs(measured.videos[name] - expected).max() <= 1
    score = lambda video: clip_psnr(video[:, 1:], clips["frames"][:, 1:]).mean()
    assert np.isclose(measured.numbers["psnr_true_keys"], score(measured.videos["true_keys"]))
    assert np.isclose(measured.numbers["psnr_other_keys"], score(measured.videos["other_keys"]))
    assert np.isclose(measured.numbers["psnr_frozen"], score(clips["frames"][:, :1].repeat(FRAMES, 1)))
    assert measured.numbers["psnr_true_keys"] != measured.numbers["psnr_other_keys"]
    assert (measured.numbers["height"], measured.numbers["width"]) == SIZE
    assert len(measured.by_frame["true_keys"]) == FRAMES - 1


def test_clips_that_the_world_has_not_the_size_for(data):
    clips = suite.held_out_clips(data, 2)
    with pytest.raises(
        ConfigError, match="config.data.size = \\(40, 64\\): must be multiples of \\(16, 16\\)"
    ):
        suite.evaluate_world(world(), clips)


def test_the_value_of_the_training_loop(data):
    config = TrainConfig(
        run="unused",
        stage="world",
        steps=4,
        data=data,
        world=TINY_WORLD,
        codec="unused",
        size=SIZE,
        validation=ValidationConfig(every=2, clips=2),
    )
    assert suite.make_validation(dataclasses.replace(config, validation=ValidationConfig())) is None
    numbers, videos = suite.make_validation(config)(world(), 2)
    assert numbers["clips"] == 2 and all(np.isfinite(value) for value in numbers.values())
    (video,) = videos.values()
    assert video.dtype == np.uint8 and video.shape == (FRAMES, 2 * 36, 3 * 68, 3)
    few = dataclasses.replace(config, validation=ValidationConfig(every=2, clips=9))
    with pytest.raises(ConfigError, match="config.validation.clips = 9"):
        suite.make_validation(few)
