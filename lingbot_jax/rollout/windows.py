"""A long video from a model of short clips: every window continues the last frames of the one before."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Shaped

from lingbot_jax.config import require

Frames = Shaped[np.ndarray, "f h w 3"]


@dataclasses.dataclass(frozen=True)
class Windows:
    """How a video is cut.

    Attributes:
      frames: of the whole video. clip_frames: generated at a time, stride * n + 1.
      overlap: frames of a clip that are already there, stride * n + 1 and fewer than the clip: more keep motion and
        texture steadier and cost more windows. Where the video is one clip it is not looked at.
      stride: video frames per latent frame.
    """

    frames: int
    clip_frames: int
    overlap: int
    stride: int = 4

    def __post_init__(self):
        """Raises ConfigError: sizes that do not fit."""
        require(self.frames > 0, "frames", self.frames, "must be positive")
        rule = f"must be {self.stride}n + 1"
        ok = lambda n: n > 0 and n % self.stride == 1 % self.stride
        require(ok(self.clip_frames), "clip_frames", self.clip_frames, rule)
        if self.clip_frames < self.frames:
            fits = ok(self.overlap) and self.overlap < self.clip_frames
            require(
                fits,
                "overlap",
                self.overlap,
                f"{rule} and less than clip_frames = {self.clip_frames}",
            )

    @property
    def count(self) -> int:
        """Windows that the video takes."""
        if self.clip_frames >= self.frames:
            return 1
        new = max(self.clip_frames - self.overlap, 1)
        return 1 + -(-(self.frames - self.clip_frames) // new)


def extend(
    first: Shaped[np.ndarray, "h w 3"], windows: Windows, generate: Callable[[Frames, int], Frames]
) -> Frames:
    """Generates a video whose first frame is `first`, in windows of one size.

    Poses are relative to a window's own first frame, so positions never leave the range of training.

    Args:
      generate: `generate(known, start)` makes the whole clip that begins at frame `start` of the video and whose first
        frames are `known`: one frame for the first window, `overlap` for the others. The last one may reach past the
        end of the video; what is too much is cut.
    """
    video = first[None]
    while len(video) < windows.frames:
        known = video[-windows.overlap :] if len(video) > 1 else video
        start = len(video) - len(known)
        made = generate(known, start)
        video = np.concatenate([video, made[len(known) :]])
    return video[: windows.frames]
