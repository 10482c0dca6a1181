"""What post-training is worth: models side by side on recorded clips, over time and in long play.

Every number is of a span of time that ends at a moment and is half as long as the time until then, and at most 4
seconds: `1s` is the second half of the first second, `60s` the last 4 seconds of a minute.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, UInt8

from lingbot_jax.evaluation.action_following import follow
from lingbot_jax.evaluation.quality import Looks, drift, looks
from lingbot_jax.evaluation.video import clip_psnr

SECONDS = (1, 2, 4, 8, 60)
LONGEST = 4.0  # seconds of a span


@dataclasses.dataclass(frozen=True)
class Clips:
    """Videos of one length and the camera paths that they were to follow.

    Attributes:
      videos: frame 0 is given. c2w: commanded poses; of keys, `keyboard.integrate(keys, start)`.
      intrinsics: fx fy cx cy in pixels of the videos.
    """

    videos: UInt8[np.ndarray, "b f H W 3"]
    c2w: Float[np.ndarray, "b f 4 4"]
    intrinsics: Float[np.ndarray, "b 4"]


@dataclasses.dataclass(frozen=True)
class PostTraining:
    """What `compare` finds; plain dictionaries of finite numbers, as JSON has them.

    Attributes:
      table: by model and time (`1s` ...): psnr in dB against the recording (of recorded clips alone), sharpness as a
        share of the recorded, action_following as the correlation of turns (None where none was commanded).
      looks: by model and time: brightness and contrast against recorded video.
      drift: by model, of play alone: largest departure of sharpness, brightness and contrast from those at 2 s.
    """

    table: dict[str, dict[str, dict[str, float | None]]]
    looks: dict[str, dict[str, dict[str, float]]]
    drift: dict[str, dict[str, float]]


def span(seconds: float, fps: float) -> slice:
    """The frames of the span of time that ends at `seconds`; frame i is at i / fps."""
    begin = seconds - min(seconds / 2, LONGEST)
    return slice(math.floor(begin * fps) + 1, round(seconds * fps) + 1)


def measure(
    clips: Clips,
    recorded: UInt8[np.ndarray, "b2 f2 H W 3"],
    fps: float,
    grid: tuple[int, int],
    seconds: float,
    paired: bool,
) -> tuple[dict[str, float | None], Looks]:
    """One cell of the table, and brightness and contrast.

    Args:
      paired: the recorded clips are the truth of these, frame by frame: compared with the same span of time, and with
        a psnr. Otherwise they are what looks are compared with, whatever they show.
    """
    part = span(seconds, fps)
    ours, truth = clips.videos[:, part], recorded[:, part] if paired else recorded
    found = looks(ours, truth, grid)
    upto = (x[:, : part.stop] for x in (clips.videos, clips.c2w))
    turned = follow(*upto, clips.intrinsics, part.start, min(4, part.stop - part.start))
    following = None if math.isnan(turned.correlation) else turned.correlation
    numbers = {"psnr": float(clip_psnr(ours, truth).mean())} if paired else {}
    return numbers | {"sharpness": found.sharpness, "action_following": following}, found


def compare(
    models: Mapping[str, Clips],
    recorded: UInt8[np.ndarray, "b f H W 3"],
    fps: float,
    grid: tuple[int, int] = (8, 8),
    played: Mapping[str, Clips] | None = None,
) -> PostTraining:
    """Measures models on recorded clips at every time of `SECONDS` that those reach, and play at the times beyond.

    Args:
      models: by name (`teacher`, `causal`, `distilled`), the recorded clips as each generates them.
      fps: of all videos. grid: height and width in pixels of the codec's patches.
      played: by name, long play without a truth; of any camera paths.

    Raises:
      ValueError: clips of another size than the recorded ones, or what `quality.sharpness` refuses.
    """
    reached = lambda videos: [s for s in SECONDS if videos.shape[1] > round(s * fps)]
    known = reached(recorded)
    cells: dict[str, dict[str, tuple[dict[str, float | None], Looks]]] = {}
    for name, clips in models.items():
        if clips.videos.shape != recorded.shape:
            raise ValueError(f"{name}: videos {clips.videos.shape}, recorded {recorded.shape}")
        cells[name] = {f"{s}s": measure(clips, recorded, fps, grid, s, paired=True) for s in known}
    drifts = {}
    for name, clips in (played or {}).items():
        beyond = [s for s in reached(clips.videos) if s not in known]
        found = {f"{s}s": measure(clips, recorded, fps, grid, s, paired=False) for s in beyond}
        cells[name] = cells.get(name, {}) | found
        drifts[name] = drift(clips.videos[:, 1:], recorded, fps, grid)._asdict()
    return PostTraining(
        table={name: {time: numbers for time, (numbers, _) in row.items()} for name, row in cells.items()},
        looks={
            name: {time: {"brightness": x.brightness, "contrast": x.contrast} for time, (_, x) in row.items()}
            for name, row in cells.items()
        },
        drift=drifts,
    )
