"""Each measure falls on the video that should fail it, and on no other; and the table that they fill."""

import functools
import json

import cv2
import numpy as np
import pytest

from lingbot_jax.evaluation import post_training
from lingbot_jax.evaluation.action_following import commanded_turns, follow, recovered_turns
from lingbot_jax.evaluation.post_training import Clips
from lingbot_jax.evaluation.quality import drift, luma, sharpness
from lingbot_jax.evaluation.quality import looks as measure
from lingbot_jax.evaluation.video import clip_psnr
from tests.evaluation import scenes

KEYS = (
    "w-8,wl-12,none-4,j-8",
    "l-16,w-8,j-8",
    "j-8,w-12,wk-8,i-4",
    "k-4,l-16,w-12",
    "j-20,w-12",
    "w-12,i-8,l-12",
)
PATHS = np.stack([scenes.path(keys, 1.1 * i) for i, keys in enumerate(KEYS)])
INTRINSICS = np.tile(scenes.INTRINSICS, (len(KEYS), 1))
STYLES = ("game", "rendered")


@functools.cache
def truth(style):
    return np.stack([scenes.render(path, style, seed) for seed, path in enumerate(PATHS)])


@functools.cache
def faulty(style):
    """Videos by fault, with the measures that should fall on each."""
    videos = truth(style)
    paths = np.roll(PATHS, 1, axis=0)
    other = np.stack([scenes.render(path, style, seed) for seed, path in enumerate(paths)])
    part = videos.copy()
    part[:, :, 16:32] = scenes.with_block_noise(videos, 3, 15)[:, :, 16:32]
    grey = videos.mean()
    return {
        "none": (videos, ()),
        "elsewhere": (np.stack([scenes.render(p, style, 10 + i) for i, p in enumerate(PATHS)]), ()),
        "frozen": (videos[:, :1].repeat(videos.shape[1], 1), ("following",)),
        "other keys": (other, ("following",)),
        "blurred": (scenes.blurred(videos), ("sharpness",)),
        "block noise, flat": (scenes.with_block_noise(videos, 1), ("sharpness",)),
        "block noise, slopes": (scenes.with_block_noise(videos, 2), ("sharpness",)),
        "block noise, waves": (scenes.with_block_noise(videos, 4), ("sharpness",)),
        "block noise, a third": (part, ("sharpness",)),
        "block noise on blur": (scenes.with_block_noise(scenes.blurred(videos, 1.5), 3), ("sharpness",)),
        "smeared": (scenes.smeared(videos), ("sharpness",)),
        "dark": ((0.7 * videos + 0.3 * np.minimum(videos, 50)).astype(np.uint8), ("brightness", "contrast")),
        "pale": ((0.7 * videos + 0.3 * grey).astype(np.uint8), ("contrast",)),
    }


@pytest.mark.parametrize("style", STYLES)
def test_each_measure_falls_where_it_should_and_nowhere_else(style):
    for fault, (videos, falls) in faulty(style).items():
        looks = measure(videos, truth(style))
        following = follow(videos, PATHS, INTRINSICS)
        fallen = {
            "sharpness": looks.sharpness < 0.8,
            "brightness": looks.brightness < -0.05,
            "contrast": looks.contrast < 0.85,
            "following": following.correlation < 0.9,
        }
        assert {name for name, fell in fallen.items() if fell} == set(falls), (fault, looks, following)


@pytest.mark.parametrize("style", STYLES)
def test_block_noise_is_found_on_the_codecs_grid_alone(style):
    """The variance of the Laplacian rises with it. Noise as strong on a grid moved by half a patch is texture."""
    videos = truth(style)
    noisy = scenes.with_block_noise(videos, 3)
    moved = np.roll(scenes.with_block_noise(np.roll(videos, 4, (2, 3)), 3), -4, (2, 3))
    laplacian = lambda v: np.mean([cv2.Laplacian(x, cv2.CV_32F).var() for x in luma(v)])
    assert laplacian(noisy) > laplacian(videos)
    assert sharpness(noisy, videos) < 0.8 < 0.95 < sharpness(moved, videos)
    falling = [sharpness(scenes.with_block_noise(videos, 3, size), videos) for size in (0, 2, 5, 10, 20)]
    assert falling[0] == pytest.approx(1) and falling == sorted(falling, reverse=True)
    blurred = [sharpness(scenes.blurred(videos, sigma), videos) for sigma in (0.4, 0.6, 1.0, 2.0)]
    assert blurred == sorted(blurred, reverse=True)


@pytest.mark.parametrize("style", STYLES)
def test_noise_is_not_sharp(style):
    """It has more gradients than any picture, of every pixel for itself or of every patch for itself."""
    videos, rng = truth(style), np.random.default_rng(0)
    white = rng.integers(0, 256, videos.shape).astype(np.uint8)
    assert measure(white, videos).sharpness < 0.05
    for waves in (1, 2, 4, 8):
        patches = scenes.with_block_noise(np.full_like(videos, 128), waves, 40)
        assert sharpness(patches, videos) < 0.15, waves


def test_sharpness_refuses_what_it_cannot_say():
    videos = truth("game")
    with pytest.raises(ValueError, match=r"grid = \(32, 8\): a frame of 48 x 64 must hold it twice"):
        sharpness(videos, videos, (32, 8))
    with pytest.raises(ValueError, match="no sharpness"):
        sharpness(np.zeros_like(videos), videos)


def test_turns_are_recovered_in_degrees():
    """Of a camera that only turns; a step aside says nothing of yaw."""
    path = scenes.path("l-8,ji-8,k-8")
    told = commanded_turns(path)
    np.testing.assert_allclose(told.degrees[1:9], [[3, 0]] * 8, atol=1e-9)
    np.testing.assert_allclose(told.degrees[9:17], [[-3, 3]] * 8, atol=1e-9)
    seen = recovered_turns(scenes.render(path, "game"), scenes.INTRINSICS)
    np.testing.assert_allclose(seen[1:], told.degrees[1:], atol=0.6)
    aside = commanded_turns(scenes.path("a-4,wl-4"))
    assert not aside.steady[1:5, 0].any() and aside.steady[5:].all() and aside.steady[:, 1].all()


def test_agreement_counts_turns_alone():
    following = follow(truth("game"), PATHS, INTRINSICS)
    assert following.yaw_agreement == following.pitch_agreement == 1
    walk = scenes.path("w-8")[None]
    found = follow(scenes.render(walk[0], "game")[None], walk, INTRINSICS[:1])
    assert found.spans == 0 and np.isnan(found.yaw_agreement) and np.isnan(found.correlation)
    mirrored = follow(truth("game")[..., ::-1, :], PATHS, INTRINSICS)
    assert (mirrored.yaw_agreement, mirrored.pitch_agreement) == (0, 1) and mirrored.yaw_correlation < -0.9
    with pytest.raises(ValueError, match="videos of 4 frames"):
        follow(truth("game")[:, :4], PATHS[:, :4], INTRINSICS)


def test_drift_is_the_largest_departure():
    """Play of 16 s whose looks change after the half, against recordings of other rooms."""
    videos, recorded = truth("game")[:, 1:], faulty("game")["elsewhere"][0]
    steady = np.concatenate([videos, videos], 1)
    assert max(drift(steady, recorded, 4.0)) < 0.2  # what is seen changes
    for change, name, least in (
        (scenes.blurred, "sharpness", 0.3),
        (lambda v: (v * 0.6 + 0.4 * v.mean()).astype(np.uint8), "contrast", 0.3),
        (lambda v: np.minimum(v + 60.0, 255).astype(np.uint8), "brightness", 0.2),
    ):
        drifted = drift(np.concatenate([videos, change(videos)], 1), recorded, 4.0)
        assert getattr(drifted, name) > least, name
    with pytest.raises(ValueError, match="drift needs 2 windows of 32 frames"):
        drift(videos, recorded, 16.0)


def test_the_table():
    """At 2 frames per second the recordings last 16 seconds and play a minute."""
    recorded = truth("game")
    bad = Clips(scenes.blurred(recorded), PATHS, INTRINSICS)
    good = Clips(recorded, PATHS, INTRINSICS)

    def again(clips):
        """Four times one after the other: a minute."""
        four = (np.concatenate([x[:, 1:]] * 4, 1) for x in (clips.videos, clips.c2w))
        return Clips(*four, INTRINSICS)

    found = post_training.compare(
        {"teacher": good, "causal": bad},
        recorded,
        2.0,
        played={"teacher": again(good), "distilled": again(bad)},
    )
    times = ["1s", "2s", "4s", "8s"]
    assert {name: list(row) for name, row in found.table.items()} == {
        "teacher": [*times, "60s"],
        "causal": times,
        "distilled": ["60s"],
    }
    assert found.table["teacher"]["8s"].keys() == {"psnr", "sharpness", "action_following"}
    assert found.table["distilled"]["60s"].keys() == {"sharpness", "action_following"}
    part = post_training.span(8, 2.0)
    assert (part.start, part.stop) == (9, 17)
    assert found.table["causal"]["8s"]["psnr"] == pytest.approx(
        clip_psnr(bad.videos[:, part], recorded[:, part]).mean()
    )
    assert found.table["causal"]["8s"]["sharpness"] < 0.6 < 0.99 < found.table["teacher"]["8s"]["sharpness"]
    assert found.drift.keys() == {"teacher", "distilled"}
    json.dumps([found.table, found.looks, found.drift], allow_nan=False)
    with pytest.raises(ValueError, match="causal: videos"):
        post_training.compare({"causal": Clips(recorded[:, :9], PATHS[:, :9], INTRINSICS)}, recorded, 2.0)
