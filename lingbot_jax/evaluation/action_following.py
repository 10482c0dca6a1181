"""Action following: whether a generated world moves as the keys say, seen in its pixels alone."""

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from lingbot_jax.control.keyboard import KEYS


def horizontal_flow(video: UInt8[np.ndarray, "f h w 3"], scale: int = 2) -> Float[np.ndarray, "f"]:
    """Median horizontal optical flow into each frame, in pixels (right is positive); 0 for frame 0.

    Dense inverse search on a picture enlarged `scale` times: its patches of 8 pixels suit more than 100 a side.
    """
    grey = [cv2.cvtColor(cv2.resize(x, None, fx=scale, fy=scale), cv2.COLOR_RGB2GRAY) for x in video]
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    pairs = zip(grey, grey[1:], strict=False)
    return np.array([0.0] + [np.median(search.calc(a, b, None)[..., 0]) / scale for a, b in pairs])


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
