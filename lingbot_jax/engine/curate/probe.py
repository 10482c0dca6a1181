"""Ingest and probe: which files there are, which are videos, and the basic filter (paper section 2.2.1).

A file is judged by its bytes, not by its name.
"""

import dataclasses
import os
import pathlib

import numpy as np

from lingbot_jax.config import ConfigError
from lingbot_jax.engine.curate.config import CurateConfig
from lingbot_jax.engine.curate.frames import open_video, packets, pictures
from lingbot_jax.engine.curate.items import Rejected, Video
from lingbot_jax.files import reached

_BACK = 1.0  # seconds before 0 that reordered pictures may begin: codecs do
_LONGEST = 10 * 24 * 3600.0  # seconds between the first and the last picture of a file that is meant
_LISTED = 16 << 20  # bytes of a list of paths


def ingest(config: CurateConfig) -> list[Video]:
    """Every regular file of the source, by name; hidden ones are left out.

    Raises:
      ConfigError: the source is missing or cannot be read, or lists a file that is missing.
    """
    source = pathlib.Path(config.source).absolute()
    with reached(source, "config.source"):
        if source.is_dir():
            found = [pathlib.Path(folder, n) for folder, _, names in os.walk(source) for n in names]
            named = [(p.relative_to(source), p) for p in found]
            named = [(n, p) for n, p in named if not any(x.startswith(".") for x in n.parts) and p.is_file()]
        else:
            if source.stat().st_size > _LISTED:
                raise ConfigError(
                    f"config.source = {str(source)!r}: must be a folder or a list of paths, one a line"
                )
            named = [(pathlib.Path(x), source.parent / x) for x in _lines(source)]
            missing = [str(p) for _, p in named if not p.is_file()]
            if missing:
                raise ConfigError(f"config.source = {str(source)!r}: {missing[0]}: no such file")
        return sorted((Video(str(p), str(n), p.stat().st_size) for n, p in named), key=lambda v: v.name)


def _lines(path: pathlib.Path) -> list[str]:
    try:
        return sorted({line.strip() for line in path.read_text().splitlines() if line.strip()})
    except UnicodeDecodeError:
        raise ConfigError(
            f"config.source = {str(path)!r}: must be a folder or a list of paths, one a line"
        ) from None


def probe(config: CurateConfig, video: Video) -> Video:
    """The video with what its container says; times are those of its packets, not of the header.

    Raises:
      Rejected: it is none, or fails the basic filter.
    """
    if not video.nbytes:
        raise Rejected("empty file")
    with open_video(video.path) as container:
        if not container.streams.video:
            raise Rejected("no video stream")
        stream = container.streams.video[0]
        context = stream.codec_context
        if context is None:
            raise Rejected("unknown codec")
        height, width = context.height, context.width
        if min(height, width) < config.probe.min_side:
            raise Rejected("too small", f"{width} x {height} pixels")
        if max(height, width) > config.probe.max_side:
            raise Rejected("too large", f"{width} x {height} pixels")
        ratio = stream.sample_aspect_ratio
        width = round(width * float(ratio)) if ratio and 0.2 < ratio < 5 else width
        stamps = [p.pts for p in packets(container, stream) if p.pts is not None and p.size]
        times = np.sort(np.array(stamps, np.float64) * float(stream.time_base))
        codec = context.name
    if len(times) < 2:
        raise Rejected("too short", f"{len(times)} pictures")
    if times[0] < -_BACK:
        raise Rejected("negative timestamps", f"begins at {times[0]:.1f} s")
    steps = np.diff(times)
    shown = float(np.minimum(steps, config.probe.max_gap).sum())  # what a clip can be from
    if shown < config.probe.min_seconds:
        raise Rejected("too short", f"{shown:.2f} s")
    if times[-1] - times[0] > _LONGEST:
        raise Rejected("absurd duration", f"{times[-1] - times[0]:.3g} s")
    near = steps[(steps > 0) & (steps <= config.probe.max_gap)]
    rate = (
        round(len(near) / float(near.sum()), 3) if len(near) else 0.0
    )  # of many: containers round each to 1 ms
    if rate < 0.9 * config.fps:
        raise Rejected("frame rate too low", f"{rate:.3g} per second")
    found = {"codec": codec, "height": height, "width": width, "rate": rate}
    video = dataclasses.replace(video, **found, start=float(times[0]), end=float(times[-1]))
    return _seen(video)


def _seen(video: Video) -> Video:
    """Decodes the first picture: whether there is one, and how it is turned."""
    first = next(pictures(video, video.start), None)
    if first is None:
        raise Rejected("cannot decode")
    turns = round(first.frame.rotation / 90) % 4
    turned = (video.width, video.height) if turns % 2 else (video.height, video.width)
    return dataclasses.replace(video, rotation=turns, height=turned[0], width=turned[1])
