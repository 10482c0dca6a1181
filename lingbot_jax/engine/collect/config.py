"""What to collect: one frozen dataclass, checked before any engine starts."""

import dataclasses
import math
import re
from typing import Literal

from lingbot_jax.config import require

BEHAVIOURS = {  # name -> default share of the clips (paper section 2.1.2)
    "free_navigation": 0.44,
    "loop_roaming": 0.10,
    "transition_navigation": 0.14,
    "sightseeing": 0.10,
    "stationary_360": 0.08,
    "stationary_fixed": 0.02,
    "backward_navigation": 0.12,
}
STEP = 0.05  # world units of one movement step in the stored poses, whatever the game's own unit


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """A data set is a function of this config: the same config gives the same bytes.

    Attributes:
      out: folder of the data set.
      seed: of everything: maps, starts, behaviours.
      clips, held_out: clips of each split. frames: of a clip. fps: nominal.
      size: (height, width) stored. render: the engine's picture, area-averaged down to `size`.
      step: map units a frame of a movement key (the player is 32 wide; stored as STEP).
      yaw: degrees a frame of a turning key. hold: frames a key is held, give or take a quarter.
      behaviours: name -> share of the clips.
      rooms: generated maps have rooms x rooms rooms. clips_per_map: of one map before the next.
      bundled: share of maps that are static copies of bundled Freedoom maps.
      bundled_train, bundled_held_out: which, by name: `E1M5` (freedoom1) or `MAP15` (freedoom2).
      min_light: light level that every sector of a bundled map has at least (0..255).
      clips_per_shard: a shard is what is done again after an interruption.
      compression: of records: "uncompressed" or "zstd:<level>".
      processes: engines at a time; 0 means one a core. Does not change the bytes.
    """

    out: str
    seed: int = 0
    clips: int = 640
    held_out: int = 64
    frames: int = 33
    fps: float = 16.0
    size: tuple[int, int] = (48, 64)
    render: Literal["160x120", "320x240", "640x480"] = "160x120"
    step: float = 5.0
    yaw: float = 3.0
    hold: int = 8
    behaviours: dict[str, float] = dataclasses.field(default_factory=lambda: dict(BEHAVIOURS))
    rooms: int = 4
    clips_per_map: int = 8
    bundled: float = 0.1
    bundled_train: tuple[str, ...] = ("E1M5", "E1M6", "E1M7")
    bundled_held_out: tuple[str, ...] = ("E1M8", "E1M9")
    min_light: int = 192
    clips_per_shard: int = 32
    compression: str = "zstd:1"
    processes: int = 0

    def __post_init__(self):
        for name in ("clips", "frames", "hold", "clips_per_map", "clips_per_shard", "fps", "step", "yaw"):
            require(getattr(self, name) > 0, f"config.{name}", getattr(self, name), "must be positive")
        for name in ("held_out", "processes", "seed"):
            require(getattr(self, name) >= 0, f"config.{name}", getattr(self, name), "must not be negative")
        require(bool(self.out), "config.out", self.out, "must name a folder")
        require(self.step <= 16, "config.step", self.step, "must be at most 16, half the player's width")
        require(self.yaw <= 45, "config.yaw", self.yaw, "must be at most 45 degrees")
        require(2 <= self.rooms <= 16, "config.rooms", self.rooms, "must be 2 to 16")
        require(0 <= self.bundled <= 1, "config.bundled", self.bundled, "must be a share, 0 to 1")
        require(0 <= self.min_light <= 255, "config.min_light", self.min_light, "must be 0 to 255")
        width, height = self.render_size
        require(
            0 < self.size[0] <= height and 0 < self.size[1] <= width,
            "config.size",
            self.size,
            f"must be (height, width) within config.render = {self.render}",
        )
        unknown = sorted(set(self.behaviours) - set(BEHAVIOURS))
        require(not unknown, "config.behaviours", unknown, f"allowed: {', '.join(BEHAVIOURS)}")
        shares = list(self.behaviours.values())
        require(
            shares and min(shares) >= 0 and math.isfinite(sum(shares)) and sum(shares) > 0,
            "config.behaviours",
            self.behaviours,
            "shares must not be negative and must not all be 0",
        )
        require(
            re.fullmatch(r"uncompressed|zstd:[1-9]\d?", self.compression),
            "config.compression",
            self.compression,
            "must be uncompressed or zstd:<level>",
        )
        common = sorted(set(self.bundled_train) & set(self.bundled_held_out))
        require(not common, "config.bundled_held_out", common, "a map may be in one split only")
        for split in ("train", "held_out"):
            names = getattr(self, f"bundled_{split}")
            require(names or not self.bundled, f"config.bundled_{split}", names, "needs at least one map")

    @property
    def render_size(self) -> tuple[int, int]:
        """(width, height) that the engine draws."""
        width, height = self.render.split("x")
        return int(width), int(height)
