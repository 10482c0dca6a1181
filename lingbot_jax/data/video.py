"""Video files: H.264 that browsers play, and contact sheets."""

import fractions
import pathlib
from collections.abc import Sequence

import av
import cv2
import numpy as np
from jaxtyping import UInt8

from lingbot_jax.files import whole_file, write_whole

Frames = UInt8[np.ndarray, "f h w 3"]


def write_mp4(path: str | pathlib.Path, frames: Frames, fps: float, scale: int = 1) -> None:
    """Writes RGB frames as H.264 (yuv420p, index first, so that a browser starts at once); whole or not at all.

    Args:
      fps: frames per second. scale: integer enlargement without smoothing; odd sizes lose their last row or column.
    """
    frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2
    with (
        whole_file(path) as partial,
        av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=fractions.Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "16", "preset": "medium"}
        for frame in frames[:, :height, :width]:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"))
            )
        container.mux(stream.encode())


def contact_sheet(
    rows: Sequence[tuple[str, Frames]], columns: int, scale: int = 2, margin: int = 4
) -> UInt8[np.ndarray, "H W 3"]:
    """Frames of several videos, evenly spread over time, one labelled row per video."""
    cells = []
    for label, video in rows:
        picked = video[np.linspace(0, len(video) - 1, columns).round().astype(int)]
        cells.append((label, picked.repeat(scale, axis=1).repeat(scale, axis=2)))
    height, width = cells[0][1].shape[1:3]
    left = 110
    sheet = np.full(
        (len(rows) * (height + margin) + margin, left + columns * (width + margin), 3), 255, np.uint8
    )
    for r, (label, picked) in enumerate(cells):
        y = margin + r * (height + margin)
        for line, text in enumerate(label.split("\n")):
            at = (6, y + height // 2 - 8 + 18 * line)
            cv2.putText(sheet, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (40, 40, 40), 1, cv2.LINE_AA)
        for c, image in enumerate(picked):
            x = left + c * (width + margin)
            sheet[y : y + height, x : x + width] = image
    return sheet


def write_image(path: str | pathlib.Path, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Writes an RGB image in the format of the file name, whole or not at all. Raises OSError if it cannot."""
    _, encoded = cv2.imencode(pathlib.PurePath(path).suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    write_whole(path, encoded.tobytes())
