"""Small clips for tests, made without a game."""

from pathlib import Path

import numpy as np

from lingbot_jax.control.keyboard import integrate
from lingbot_jax.data.records import shard_name, write_shard
from lingbot_jax.data.schema import Captions, Clip, Event, encode


def make_clip(number: int = 0, frames: int = 9, size: tuple[int, int] = (6, 8), split: str = "train") -> Clip:
    """A clip whose frame i of clip n is filled with 16 n + i, so that windows can be told apart."""
    rng = np.random.default_rng(number)
    keys = np.zeros((frames, 8), np.uint8)
    keys[1:, 0] = 1
    keys[1:, 5] = rng.integers(0, 2, frames - 1)
    values = (16 * number + np.arange(frames)) % 256
    return Clip(
        frames=np.broadcast_to(values[:, None, None, None], (frames, *size, 3)).astype(np.uint8),
        keys=keys,
        c2w=integrate(keys),
        intrinsics=np.tile(np.float32([4.0, 4.8, 4.0, 3.0]), (frames, 1)),
        timestamps=np.arange(frames) / 16.0,
        clip_id=f"{split}-{number}",
        source="test",
        split=split,
        map=f"map-{number % 2}",
        seed=number,
        behaviour="free_navigation",
        fps=16.0,
        captions=Captions("A walk.", "A place.", (Event(0.0, 0.25, "The camera walks forward."),)),
        extra={"note": "é"},
    )


def make_data(
    folder: Path, clips: int = 12, shards: int = 2, frames: int = 9, split: str = "train"
) -> list[Path]:
    """Writes shards of clips 0, 1, ... in order; returns their paths."""
    paths, each = [], clips // shards
    for k in range(shards):
        paths.append(folder / shard_name(split, k, shards))
        numbers = range(k * each, (k + 1) * each)
        write_shard(paths[-1], (encode(make_clip(n, frames, split=split)) for n in numbers), "uncompressed")
    return paths
