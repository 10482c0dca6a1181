"""How videos are curated: one frozen dataclass, checked before any file is opened."""

import re
from typing import Annotated, Literal

from pydantic import Field

from lingbot_jax.config import Count, Fraction, NonNegative, Path, Positive, Seed, config, require
from lingbot_jax.files import is_remote

Side = Annotated[int, Field(ge=16, le=4096)]
Frames = Annotated[int, Field(ge=2, le=100_000)]
LEVELS = {  # attribute that `select.shares` may be of -> its bounds of low | medium | high
    "motion": (0.002, 0.01),  # mean optical flow per frame, widths of the picture
    "turning": (0.2, 1.0),  # mean degrees per frame
    "brightness": (60.0, 150.0),  # mean luma
}


@config
class ProbeConfig:
    """The basic filter (paper section 2.2.1)."""

    min_side: Annotated[int, Field(ge=1, le=4096)] = Field(
        64, description="pixels of the shorter side; below: dropped"
    )
    max_side: Annotated[int, Field(ge=64, le=16384)] = Field(
        8192, description="pixels of the longer side; above: dropped"
    )
    min_seconds: NonNegative = Field(1.0, description="shorter videos are dropped")
    max_gap: Annotated[Positive, Field(le=2)] = Field(
        0.5, description="seconds without a picture that end a segment: no clip reaches across"
    )


@config
class SplitConfig:
    """Shots, and the clips that they are cut into."""

    detector: Literal["adaptive", "content"] = Field("adaptive", description="of PySceneDetect")
    threshold: Positive = Field(3.0, description="of the detector: adaptive 3, content 27")
    trim: Annotated[NonNegative, Field(le=60)] = Field(
        0.125, description="seconds left out at both ends of a shot"
    )
    min_frames: Frames = Field(33, description="of a clip; shorter shots are dropped")
    max_frames: Frames = Field(81, description="of a clip; longer shots give several")

    def __post_init__(self):
        fits = self.min_frames <= self.max_frames
        require(fits, "min_frames", self.min_frames, f"must be at most max_frames = {self.max_frames}")


@config
class ProfileConfig:
    """What a clip must look like. Shares are of its frames."""

    black: Annotated[NonNegative, Field(le=255)] = Field(
        12.0, description="mean luma below which a frame is black"
    )
    blur: NonNegative = Field(
        0.15,
        description="least sharpness: strongest edges of a frame, in its contrast per pixel; 0 keeps all",
    )
    max_black: Fraction = Field(0.2, description="share of black frames")
    max_blurred: Fraction = Field(0.5, description="share of blurred frames")
    max_frozen: Fraction = Field(0.9, description="share of frames that repeat the one before")


@config
class PoseConfig:
    """Camera poses from the pictures alone."""

    width: Annotated[int, Field(ge=64, le=1280)] = Field(
        320, description="pixels that pictures are scaled to before"
    )
    points: Annotated[int, Field(ge=50, le=5000)] = Field(500, description="tracked at a time")
    still: Annotated[Positive, Field(le=10)] = Field(
        0.35, description="pixels: a median motion below it, rotation taken out, is no translation"
    )
    focal: Annotated[float, Field(gt=0.1, le=10, allow_inf_nan=False)] | None = Field(
        None,
        description="fx in widths of the picture (0.5: 90 degrees across); None: estimated, one per video",
    )
    assumed_focal: Annotated[float, Field(gt=0.1, le=10, allow_inf_nan=False)] | None = Field(
        None, description="where it cannot be estimated; None: such clips are dropped"
    )
    min_confidence: Fraction = Field(0.5, description="clips below are dropped")
    unscaled: bool = Field(
        False, description="keep clips whose pieces of path have no common scale, each at unit steps"
    )


@config
class KeysConfig:
    """Keys from poses: thresholds are shares of the step, degrees per frame."""

    move: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="of the clip's usual step, from which a key is down"
    )
    turn: Annotated[Positive, Field(le=90)] = Field(
        0.5, description="degrees per frame of yaw from which a key is down"
    )
    pitch: Annotated[Positive, Field(le=90)] = Field(0.5, description="degrees per frame of pitch")
    min_confidence: Fraction = Field(0.0, description="clips whose keys are less certain are dropped")


@config
class SelectConfig:
    """Which of the good clips are written."""

    duplicates: Annotated[int, Field(ge=0, le=15)] = Field(
        4, description="bits of 64 in which all three hashes of near-duplicates differ at most"
    )
    clips: Count = Field(0, description="how many at most; 0: all")
    shares: dict[str, dict[Literal["low", "medium", "high"], Fraction]] = Field(
        {},
        description=f"target shares by attribute ({', '.join(LEVELS)}): what there is too much of is left out",
    )
    held_out: Fraction = Field(0.1, description="share of the videos whose clips are held out")
    seed: Seed = Field(0, description="of the choice")

    def __post_init__(self):
        unknown = sorted(set(self.shares) - set(LEVELS))
        require(not unknown, "shares", unknown, f"allowed: {', '.join(LEVELS)}")
        for name, parts in self.shares.items():
            require(sum(parts.values()) > 0, f"shares.{name}", parts, "must not all be 0")


@config
class CurateConfig:
    """A data set is a function of this config and of the files: the same give the same bytes."""

    source: Path = Field(description="folder of videos, or a text file that lists them, one path a line")
    out: Path = Field(description="folder of the data set, local")
    size: tuple[Side, Side] = Field(
        (240, 320), description="height, width stored: scaled to cover it and cut about the centre"
    )
    fps: Annotated[float, Field(gt=0, le=240, allow_inf_nan=False)] = Field(
        16.0, description="frames per second stored, or nearly, see `rate`"
    )
    rate: Literal["even", "exact"] = Field(
        "even",
        description="even: every n-th picture, as near to fps as that can be; exact: fps, by the nearest pictures",
    )
    probe: ProbeConfig = Field(ProbeConfig(), description="the basic filter")
    split: SplitConfig = Field(SplitConfig(), description="shots")
    profile: ProfileConfig = Field(ProfileConfig(), description="what is seen")
    pose: PoseConfig = Field(PoseConfig(), description="poses")
    keys: KeysConfig = Field(KeysConfig(), description="keys")
    select: SelectConfig = Field(SelectConfig(), description="the choice")
    clips_per_shard: Annotated[int, Field(ge=1, le=10**6)] = Field(
        32, description="made again after an interruption"
    )
    compression: str = Field("zstd:1", description="of records: uncompressed, or zstd:LEVEL with 1 to 22")
    workers: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="processes; 0: this one. Does not change the bytes"
    )

    def __post_init__(self):
        for name in ("source", "out"):
            require(not is_remote(getattr(self, name)), name, getattr(self, name), "must be local")
        codec = re.fullmatch(r"uncompressed|zstd:([1-9]|1\d|2[0-2])", self.compression)
        require(codec, "compression", self.compression, "must be uncompressed or zstd:LEVEL, 1 to 22")
