"""Brings recorded windows to the size of a run or a phase, on the host, in the thread that makes batches."""

import cv2
import numpy as np
from jaxtyping import UInt8

from lingbot_jax.control import poses
from lingbot_jax.data.loader import Batch as Window


def resize_window(window: Window, size: tuple[int, int]) -> Window:
    """A batch of windows scaled until it covers `size` (height, width) and cropped to it about the centre.

    Intrinsics follow, so the control of a pixel stays the ray through it. (0, 0) leaves the window as it is.
    """
    frames: UInt8[np.ndarray, "b f h w 3"] = window["frames"]
    stored = frames.shape[2:4]
    if size in ((0, 0), stored):
        return window
    scale = max(wanted / have for wanted, have in zip(size, stored, strict=True))
    height, width = (max(round(have * scale), wanted) for wanted, have in zip(size, stored, strict=True))
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    # Averaging over the covered area when shrinking: no aliasing.
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    made = np.empty((*frames.shape[:2], *size, 3), np.uint8)
    for clip, out in zip(frames, made, strict=True):
        for i, frame in enumerate(clip):
            scaled = cv2.resize(frame, (width, height), interpolation=method)
            out[i] = scaled[top : top + size[0], left : left + size[1]]
    intrinsics = poses.transform_intrinsics(window["intrinsics"], (height, width), base=stored)
    intrinsics = (intrinsics - [0, 0, left, top]).astype(
        np.float32
    )  # the crop as it was cut, in whole pixels
    return window | {"frames": made, "intrinsics": intrinsics}
