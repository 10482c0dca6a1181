"""Split: a video into segments without gaps, those into shots, those into clips (paper section 2.2.1)."""

import typing
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import UInt8
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector, ContentDetector

from lingbot_jax.engine.curate.config import CurateConfig, SplitConfig
from lingbot_jax.engine.curate.frames import pictures, shown
from lingbot_jax.engine.curate.items import Clip, Rejected, Video

_SLACK = 0.05  # of a frame, that times are rounded by
_WIDTH = 160  # pixels that shots are looked for at


class ShotDetector(typing.Protocol):
    """Finds cuts in pictures that come one after another; made anew for every segment."""

    def push(self, picture: UInt8[np.ndarray, "h w 3"]) -> Sequence[int]:
        """Takes the next picture (RGB); returns the numbers of pictures that begin a shot, as far as they are known."""


class SceneDetect:
    """PySceneDetect's detectors, told about frames and not about files. No shot is shorter than 2 frames."""

    def __init__(self, config: SplitConfig):
        made = {"adaptive": AdaptiveDetector, "content": ContentDetector}[config.detector]
        name = {"adaptive": "adaptive_threshold", "content": "threshold"}[config.detector]
        self._detector, self._count = made(**{name: config.threshold}, min_scene_len=2), 0

    def push(self, picture: UInt8[np.ndarray, "h w 3"]) -> Sequence[int]:
        code = FrameTimecode(self._count, fps=25.0)  # any: only numbers are asked for
        self._count += 1
        return [
            cut.frame_num
            for cut in self._detector.process_frame(code, np.ascontiguousarray(picture[..., ::-1]))
        ]


def shots(config: CurateConfig, video: Video) -> list[tuple[float, float]]:
    """First and last second of each shot, as its pictures say."""
    found: list[tuple[float, float]] = []
    times: list[float] = []
    cuts: set[int] = set()

    def end() -> None:
        bounds = [0, *sorted(cuts), len(times)]
        found.extend((times[a], times[b - 1]) for a, b in zip(bounds, bounds[1:], strict=False) if b > a)

    detector = SceneDetect(config.split)
    for picture in pictures(video, video.start):
        if times and picture.time - times[-1] > config.probe.max_gap:
            end()
            times, cuts, detector = [], set(), SceneDetect(config.split)
        times.append(picture.time)
        image = shown(video, picture.frame)
        scale = _WIDTH / max(image.shape[:2])
        if scale < 1:
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        cuts.update(detector.push(image))
    if times:
        end()
    return found


def clip_rate(config: CurateConfig, video: Video) -> float:
    """Frames per second of the clips of a video."""
    if config.rate == "exact":
        return config.fps
    return video.rate / max(1, round(video.rate / config.fps))


def split(config: CurateConfig, video: Video) -> tuple[list[Clip], list[tuple[Clip, Rejected]]]:
    """The clips of a video, and the shots that are too short for one.

    Raises:
      Rejected: nothing can be decoded.
    """
    made, short, fps = [], [], clip_rate(config, video)
    found = shots(config, video)
    if not found:
        raise Rejected("cannot decode")
    least, most = config.split.min_frames, config.split.max_frames
    for number, (first, last) in enumerate(found):
        # What touches the end of the file has no cut to keep away from.
        begin = first + config.split.trim * (number > 0)
        until = last - config.split.trim * (number < len(found) - 1)
        count = int((until - begin) * fps + _SLACK) + 1
        if count < least:
            reason = Rejected("shot too short", f"{last - first:.2f} s")
            short.append((Clip(video, first, max(count, 0), fps), reason))
            continue
        pieces = -(-count // most)
        if count // pieces < least:  # a rest too short to share is left out
            pieces = count // most
        bounds = np.linspace(0, min(count, pieces * most), pieces + 1).round().astype(int)
        for a, b in zip(bounds, bounds[1:], strict=False):
            note = {"shot": number}
            start = float(begin + a / fps)
            made.append(Clip(video, start, int(b - a), fps).noted("split", note))
    return made, short
