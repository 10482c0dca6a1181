"""Windows join without a gap or a repeated frame, and each sees exactly what it may."""

import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.rollout.windows import Windows, extend

CASES = [(49, 17, 5, 4), (17, 17, 5, 4), (20, 9, 1, 4), (2, 5, 1, 4), (9, 5, 1, 2), (6, 3, 2, 1)]


@pytest.mark.parametrize(("frames", "clip", "overlap", "stride"), CASES)
def test_frames_are_continuous_and_known_frames_are_the_last_ones(frames, clip, overlap, stride):
    number = lambda start, n: np.arange(start, start + n)[:, None, None, None] * np.ones((1, 2, 2, 3))
    calls = []

    def generate(known, start):
        np.testing.assert_array_equal(known, number(start, len(known)))
        calls.append((start, len(known)))
        return number(start, clip).astype(np.uint8)

    windows = Windows(frames, clip, overlap, stride)
    video = extend(np.zeros((2, 2, 3), np.uint8), windows, generate)
    np.testing.assert_array_equal(video, number(0, frames))
    assert len(calls) == windows.count
    assert calls[0] == (0, 1) and all(k == overlap for _, k in calls[1:])


@pytest.mark.parametrize(
    ("clip", "overlap", "line"),
    [
        (16, 5, "clip_frames = 16: must be 4n \\+ 1"),
        (17, 17, "overlap = 17: must be 4n \\+ 1 and less than clip_frames = 17"),
        (17, 4, "overlap = 4: must be 4n"),
        (17, -3, "overlap = -3"),
        (-3, 1, "clip_frames = -3"),
    ],
)
def test_misfits_are_refused(clip, overlap, line):
    with pytest.raises(ConfigError, match=line):
        Windows(40, clip, overlap)
