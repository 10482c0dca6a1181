"""Whether a generated world obeys the keys, seen in its pixels alone."""

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from lingbot_jax.control.keyboard import KEYS


def horizontal_flow(video: UInt8[np.ndarray, "f h w 3"], scale: int = 4) -> Float[np.ndarray, "f"]:
    """Median horizontal optical flow into each frame, in pixels (right is positive); 0 for frame 0.

    Farneback's flow on an enlarged picture: at 64 pixels a quick turn moves only a pixel or two a frame.
    """
    grey = [cv2.cvtColor(cv2.resize(x, None, fx=scale, fy=scale), cv2.COLOR_RGB2GRAY) for x in video]
    flow = np.zeros(len(video))
    for i in range(1, len(video)):
        field = cv2.calcOpticalFlowFarneback(grey[i - 1], grey[i], None, 0.5, 3, 21, 3, 5, 1.2, 0)
        flow[i] = np.median(field[..., 0]) / scale
    return flow


def yaw_signs(
    video: UInt8[np.ndarray, "f h w 3"], keys: UInt8[np.ndarray, "f 8"], span: int = 4
) -> tuple[int, int]:
    """Counts spans of frames where the picture moves as the turning key says: (agreeing, all).

    Turning left (J) moves the picture to the right. Spans with both keys, neither, or a sideways step (A, D),
    which moves the picture too, are left out.
    """
    held = {name: keys[:, i].astype(bool) for i, name in enumerate(KEYS)}
    flow = horizontal_flow(video)
    agree = total = 0
    for start in range(1, len(video) - span + 1, span):
        part = slice(start, start + span)
        left, right = held["J"][part].all(), held["L"][part].all()
        if left == right or held["A"][part].any() or held["D"][part].any():
            continue
        total += 1
        agree += (flow[part].sum() > 0) == left
    return agree, total
