"""What to collect: one frozen dataclass, checked before any engine starts."""

import re
from typing import Annotated, Literal

from pydantic import Field

from lingbot_jax.config import Count, Fraction, NonNegative, Path, Seed, config, require
from lingbot_jax.files import is_remote

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


Number = Annotated[int, Field(ge=1, le=10**7)]
Bundled = Annotated[str, Field(pattern=r"^(E\dM\d|MAP\d\d)$")]


@config
class CollectConfig:
    """A data set is a function of this config: the same config gives the same bytes."""

    out: Path = Field(description="folder of the data set, local")
    source: Literal["rendered", "vizdoom"] = Field(
        "rendered", description="generated places (Panda3D, BSD), or a game whose engine is non-commercial"
    )
    seed: Seed = Field(0, description="of everything: maps, starts, behaviours")
    clips: Number = Field(640, description="clips for training")
    held_out: Annotated[int, Field(ge=0, le=10**7)] = Field(
        64, description="clips of maps that training never sees"
    )
    frames: Number = Field(33, description="frames per clip")
    fps: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = Field(
        16.0, description="nominal frames per second"
    )
    size: tuple[Annotated[int, Field(ge=1, le=480)], Annotated[int, Field(ge=1, le=640)]] = Field(
        (48, 64), description="height and width stored; vizdoom: within `render`"
    )
    supersample: Annotated[int, Field(ge=1, le=8)] = Field(
        3, description="rendered: drawn so many times as large, then area-averaged"
    )
    pitching: Fraction = Field(0.4, description="rendered: share of clips that look up and down on the way")
    people: Fraction = Field(0.2, description="rendered: share of clips with somebody walking about")
    weather_changes: Fraction = Field(
        0.2, description="rendered: share of clips in which the weather changes"
    )
    render: Literal["160x120", "320x240", "640x480"] = Field(
        "160x120", description="vizdoom: the engine's picture, width x height, area-averaged down to `size`"
    )
    step: Annotated[float, Field(gt=0, le=16, allow_inf_nan=False)] = Field(
        5.0, description="map units per frame of a movement key; the player is 32 wide (stored as 0.05)"
    )
    yaw: Annotated[float, Field(gt=0, le=45, allow_inf_nan=False)] = Field(
        3.0, description="degrees per frame of a turning key"
    )
    hold: Number = Field(8, description="frames a key is held, give or take a quarter")
    behaviours: dict[str, NonNegative] = Field(
        default_factory=lambda: dict(BEHAVIOURS), description="name -> share of the clips"
    )
    rooms: Annotated[int, Field(ge=2, le=16)] = Field(
        4, description="vizdoom: generated maps have rooms x rooms rooms"
    )
    clips_per_map: Number = Field(8, description="clips of one map before the next")
    bundled: Fraction = Field(
        0.1, description="vizdoom: share of maps that are static copies of Freedoom maps"
    )
    bundled_train: tuple[Bundled, ...] = Field(
        ("E1M5", "E1M6", "E1M7"),
        description="vizdoom: which for training: E1M5 of freedoom1, MAP15 of freedoom2",
    )
    bundled_held_out: tuple[Bundled, ...] = Field(
        ("E1M8", "E1M9"), description="vizdoom: which for the held-out split"
    )
    min_light: Annotated[int, Field(ge=0, le=255)] = Field(
        192, description="vizdoom: least light level of sectors in bundled maps"
    )
    clips_per_shard: Number = Field(32, description="clips made again after an interruption")
    compression: str = Field("zstd:1", description="of records: uncompressed, or zstd:LEVEL with 1 to 22")
    processes: Count = Field(0, description="engines at a time; 0: one per core. Does not change the bytes")

    def __post_init__(self):
        remote = "must be a local folder; copy the data set to the store when it is whole"
        require(not is_remote(self.out), "out", self.out, remote)
        width, height = self.render_size
        within = f"must be (height, width) within config.render = {self.render}"
        fits = self.source != "vizdoom" or (self.size[0] <= height and self.size[1] <= width)
        require(fits, "size", self.size, within)
        unknown = sorted(set(self.behaviours) - set(BEHAVIOURS))
        require(not unknown, "behaviours", unknown, f"allowed: {', '.join(BEHAVIOURS)}")
        require(sum(self.behaviours.values()) > 0, "behaviours", self.behaviours, "shares must not all be 0")
        codec = re.fullmatch(r"uncompressed|zstd:([1-9]|1\d|2[0-2])", self.compression)
        require(codec, "compression", self.compression, "must be uncompressed or zstd:LEVEL, 1 to 22")
        common = sorted(set(self.bundled_train) & set(self.bundled_held_out))
        require(not common, "bundled_held_out", common, "a map may be in one split only")
        for split in ("train", "held_out"):
            names = getattr(self, f"bundled_{split}")
            require(names or not self.bundled, f"bundled_{split}", names, "needs at least one map")

    @property
    def render_size(self) -> tuple[int, int]:
        """(width, height) that the engine draws."""
        width, height = self.render.split("x")
        return int(width), int(height)
