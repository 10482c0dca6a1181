"""Configurations of the experiments that have no module of their own in the package."""

import dataclasses

from lingbot_jax.config import require
from lingbot_jax.data.loader import LoaderConfig
from lingbot_jax.models.config import LinearCodecConfig
from lingbot_jax.rollout.bidirectional import SampleConfig


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Attributes:
    out: the codec file. data: where the clips are. clips: training clips to fit on; held_out: clips to check on.
    """

    out: str
    data: LoaderConfig
    codec: CodecConfig = CodecConfig()
    clips: int = 640
    held_out: int = 64

    def __post_init__(self):
        require(self.clips > 0, "clips", self.clips, "must be positive")
        require(self.held_out > 0, "held_out", self.held_out, "must be positive")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Attributes:
    run: the trained run. out: the folder to write. clips: held-out clips in which something moves, at least 2.
    batch: clips generated at a time. frames: video frames a clip, 4n+1. shown: clips in the video and the sheet.
    """

    run: str
    out: str
    sample: SampleConfig
    clips: int = 64
    batch: int = 32
    frames: int = 33
    shown: int = 6
    seed: int = 0

    def __post_init__(self):
        require(self.clips >= 2, "clips", self.clips, "must be at least 2: one lends its keys to another")
        require(self.batch > 0, "batch", self.batch, "must be positive")
        require(1 <= self.shown <= self.clips, "shown", self.shown, f"must be 1 to clips = {self.clips}")
