"""A long video from a model of short clips: every window continues the last frames of the one before."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Shaped

from lingbot_jax.config import require

Frames = Shaped[np.ndarray, "f h w 3"]


def count(frames: int, window: int, overlap: int) -> int:
    """Windows that `extend` needs."""
    return 1 + max(0, -(-(frames - window) // (window - overlap)))


def extend(
    first: Shaped[np.ndarray, "h w 3"],
    frames: int,
    window: int,
    overlap: int,
    generate: Callable[[Frames, int], Frames],
) -> Frames:
    """Generates `frames` video frames, the first of which is `first`, in windows of one size.

    Poses are relative to a window's own first frame, so positions never leave the range of training.

    Args:
      window: video frames the model generates at a time, 4n+1. overlap: frames of it that are already there,
        4n+1 and fewer than the window: more keep motion and texture steadier and cost more windows.
      generate: `generate(known, start)` makes the whole window that begins at frame `start` of the video and
        whose first frames are `known`: one frame for the first window, `overlap` for the others. The window
        may reach past the end of the video; what is too much is cut.

    Raises:
      ConfigError: window and overlap that do not fit.
    """
    require(frames > 0, "frames", frames, "must be positive")
    require(window % 4 == 1, "window", window, "must be 4n+1")
    require(
        overlap % 4 == 1 and overlap < window,
        "overlap",
        overlap,
        f"must be 4n+1 and less than the window, {window}",
    )
    video = first[None]
    while len(video) < frames:
        known = video[-overlap:] if len(video) > 1 else video
        start = len(video) - len(known)
        made = generate(known, start)
        video = np.concatenate([video, made[len(known) :]])
    return video[:frames]
