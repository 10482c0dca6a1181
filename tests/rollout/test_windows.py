"""Windows join without a gap or a repeated frame, and each sees exactly what it may."""

import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.rollout.windows import count, extend


@pytest.mark.parametrize(("frames", "window", "overlap"), [(49, 17, 5), (17, 17, 5), (20, 9, 1), (2, 5, 1)])
def test_frames_are_continuous_and_known_frames_are_the_last_ones(frames, window, overlap):
    number = lambda start, n: np.arange(start, start + n)[:, None, None, None] * np.ones((1, 2, 2, 3))
    calls = []

    def generate(known, start):
        np.testing.assert_array_equal(known, number(start, len(known)))
        calls.append((start, len(known)))
        return number(start, window).astype(np.uint8)

    video = extend(np.zeros((2, 2, 3), np.uint8), frames, window, overlap, generate)
    np.testing.assert_array_equal(video, number(0, frames))
    assert len(calls) == count(frames, window, overlap)
    assert calls[0] == (0, 1) and all(k == overlap for _, k in calls[1:])


@pytest.mark.parametrize(
    ("window", "overlap", "field"), [(16, 5, "window"), (17, 17, "overlap"), (17, 4, "overlap")]
)
def test_misfits_are_refused(window, overlap, field):
    with pytest.raises(ConfigError, match=field):
        extend(np.zeros((2, 2, 3), np.uint8), 40, window, overlap, lambda *_: None)
