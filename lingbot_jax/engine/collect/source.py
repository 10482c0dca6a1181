"""What a source of clips is, and which clips a data set consists of.

`plan(config)` lists every clip of every shard before anything runs; a `Source` records one planned clip. Both
are deterministic, so a shard can be made by any process, in any order, again. Another game, or a folder of
recordings, is another class with `record` and `close`.
"""

import dataclasses
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Float

from lingbot_jax.control.keyboard import rotation_x
from lingbot_jax.data.schema import Clip
from lingbot_jax.engine.collect.config import CollectConfig

Split = Literal["train", "held_out"]
_SPLIT_NUMBER = {"train": 0, "held_out": 1}


@dataclasses.dataclass(frozen=True)
class MapName:
    """A scene: a bundled map by name, or a generated one by seed."""

    name: str
    seed: int | None  # None: bundled


@dataclasses.dataclass(frozen=True)
class Task:
    """One clip to record; with the config it decides every byte of the record."""

    split: Split
    index: int
    map: MapName
    behaviour: str

    @property
    def clip_id(self) -> str:
        return f"{self.split}-{self.index:07d}"

    def rng(self, seed: int) -> np.random.Generator:
        return np.random.default_rng([seed, _SPLIT_NUMBER[self.split], self.index])

    def fields(self, config: CollectConfig) -> dict[str, Any]:
        """Fields of the clip that are known before it is recorded."""
        return {
            "timestamps": np.arange(config.frames) / config.fps,
            "clip_id": self.clip_id,
            "split": self.split,
            "map": self.map.name,
            "seed": config.seed,
            "behaviour": self.behaviour,
            "fps": config.fps,
        }


@dataclasses.dataclass(frozen=True)
class Shard:
    """The clips of one file: what one process makes at a time."""

    split: Split
    index: int
    count: int
    tasks: tuple[Task, ...]


class EngineLost(RuntimeError):
    """The engine died or does not do what it is told; start another one."""


class Source(Protocol):
    """Records planned clips. Made once a shard; `close` frees all it holds, also after an error."""

    def record(self, task: Task) -> Clip: ...

    def close(self) -> None: ...


def camera_to_world(
    cameras: Float[np.ndarray, "f 4"], scale: float, pitch: Float[np.ndarray, "f"] | None = None
) -> Float[np.ndarray, "f 4 4"]:
    """Poses in OpenCV axes from a camera's x, y, z (map units) and angle (degrees), and its pitch (degrees, up).

    Map units are x east, y north, z up; the records' world is x east, y down, z north: (x, -z, y), right-handed.
    """
    x, y, z, angle = cameras.astype(np.float64).T
    sin, cos = np.sin(np.radians(angle)), np.cos(np.radians(angle))
    c2w = np.tile(np.eye(4), (len(cameras), 1, 1))
    c2w[:, [0, 2], 0] = np.stack([sin, -cos], 1)  # right
    c2w[:, [0, 2], 2] = np.stack([cos, sin], 1)  # forward
    if pitch is not None:
        c2w[:, :3, :3] = c2w[:, :3, :3] @ rotation_x(np.radians(pitch))
    c2w[:, :3, 3] = np.stack([x, -z, y], 1) * scale
    return c2w


def plan(config: CollectConfig) -> list[Shard]:
    """Every shard of the data set, train first."""
    shards = []
    for split, clips in (("train", config.clips), ("held_out", config.held_out)):
        tasks = _tasks(config, split, clips)
        count = -(-clips // config.clips_per_shard)
        for k in range(count):
            part = tasks[k * config.clips_per_shard : (k + 1) * config.clips_per_shard]
            shards.append(Shard(split, k, count, tuple(part)))
    return shards


def _tasks(config: CollectConfig, split: Split, clips: int) -> list[Task]:
    rng = np.random.default_rng([config.seed, _SPLIT_NUMBER[split], 0x706C616E])
    names = rng.permutation(_apportion(config.behaviours, clips)).tolist()
    maps = [_map(config, split, slot) for slot in range(-(-clips // config.clips_per_map))]
    return [Task(split, i, maps[i // config.clips_per_map], names[i]) for i in range(clips)]


def _apportion(shares: dict[str, float], clips: int) -> list[str]:
    """Each name as often as its share says, the largest remainders first: exact, not on average."""
    names = sorted(shares)
    exact = np.array([shares[n] for n in names]) / sum(shares.values()) * clips
    counts = np.floor(exact).astype(int)
    for k in np.argsort(counts - exact, kind="stable")[: clips - counts.sum()]:
        counts[k] += 1
    return [name for name, count in zip(names, counts, strict=True) for _ in range(count)]


def _map(config: CollectConfig, split: Split, slot: int) -> MapName:
    """Bundled maps are spread evenly among the generated ones; generated seeds never repeat across splits."""
    seed = (config.seed * 2 + _SPLIT_NUMBER[split]) * 1_000_000 + slot
    if config.source == "rendered":
        return MapName(f"place-{seed}", seed)
    before, after = int(config.bundled * slot + 1e-9), int(config.bundled * (slot + 1) + 1e-9)
    if after > before:
        names = config.bundled_train if split == "train" else config.bundled_held_out
        return MapName(names[before % len(names)], None)
    return MapName(f"rooms{config.rooms}-{seed}", seed)
