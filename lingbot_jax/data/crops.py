"""Crops of clips in order, for evaluation and for fitting a codec; and crops brought to the size of a run."""

import dataclasses
import itertools
from collections.abc import Iterator

import cv2
import numpy as np
from jaxtyping import UInt8

from lingbot_jax.control import poses
from lingbot_jax.data.config import DataConfig
from lingbot_jax.data.loader import Batch, Dataset, stack


def crops(config: DataConfig, split: str = "held_out", clips: int | None = None) -> Iterator[Batch]:
    """Every clip of `config.path` once, in order, from its first frame, in batches of config.batch; the last may be
    smaller. Bad records are left out.

    Args:
      clips: only that many, the first ones.

    Raises:
      DataError: as of Dataset, but for few clips; also while reading.
    """
    alone = dataclasses.replace(config, batch=1, weight=1.0, mixture=())  # no batch must be full
    dataset = Dataset(alone, split)
    records = range(min(len(dataset), clips or len(dataset)))
    made = (crop for crop in (dataset.crop(record, None) for record in records) if crop is not None)
    while batch := list(itertools.islice(made, config.batch)):
        yield stack(batch)


def resize_crops(batch: Batch, size: tuple[int, int]) -> Batch:
    """A crop, or a batch of them, scaled until it covers `size` (height, width) and cut to it about the centre.

    Intrinsics follow, so the control of a pixel stays the ray through it. (0, 0) leaves the batch as it is.
    """
    frames: UInt8[np.ndarray, "*b f h w 3"] = batch["frames"]
    stored = frames.shape[-3:-1]
    if size in ((0, 0), stored):
        return batch
    scale = max(wanted / have for wanted, have in zip(size, stored, strict=True))
    height, width = (max(round(have * scale), wanted) for wanted, have in zip(size, stored, strict=True))
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    # Averaging over the covered area when shrinking: no aliasing.
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    made = np.empty((*frames.shape[:-3], *size, 3), np.uint8)
    for frame, out in zip(frames.reshape(-1, *stored, 3), made.reshape(-1, *size, 3), strict=True):
        scaled = cv2.resize(frame, (width, height), interpolation=method)
        out[:] = scaled[top : top + size[0], left : left + size[1]]
    intrinsics = poses.transform_intrinsics(batch["intrinsics"], (height, width), base=stored)
    # Cut in whole pixels, as the frames were.
    intrinsics = (intrinsics - [0, 0, left, top]).astype(np.float32)
    return batch | {"frames": made, "intrinsics": intrinsics}
