"""Configs of the experiments that have no module of their own in the package."""

from typing import Annotated, Literal

from pydantic import Field

from lingbot_jax.config import Count, NonNegative, Path, Positive, PositiveInt, Seed, config, require
from lingbot_jax.data.config import DataConfig
from lingbot_jax.diffusion.guidance import Scale
from lingbot_jax.diffusion.solvers import SolverName
from lingbot_jax.models.config import ConvCodecConfig, LinearCodecConfig

Side = Annotated[int, Field(gt=0, le=16384)]


@config
class FitCodecConfig:
    """Of experiments.fit_codec."""

    out: Path = Field(description="the codec: a bundle folder to write, local or gs://")
    data: DataConfig = Field(description="the clips")
    codec: Annotated[LinearCodecConfig | ConvCodecConfig, Field(discriminator="kind")] = Field(
        LinearCodecConfig(), description="its sizes"
    )
    clips: PositiveInt = Field(
        640, description="training clips that linear parts are fitted on, the first ones"
    )
    steps: Count = Field(
        400, description="conv: updates of the networks, data.batch crops of data.frames each"
    )
    learning_rate: Annotated[Positive, Field(le=10)] = Field(
        0.03, description="conv: of Muon, in spectral norm"
    )
    noise: Annotated[NonNegative, Field(le=10)] = Field(
        0.05, description="conv: standard deviation of noise on the latents while the decoder trains"
    )
    seed: Seed = Field(0, description="conv: of the networks and the noise")
    held_out: PositiveInt = Field(64, description="held-out clips that its reconstruction is measured on")


@config
class ClipsConfig:
    """The clips that a world is measured on; what is None is as the run was trained, at the start of its curriculum."""

    path: Path | None = Field(None, description="folder of the data set, local or gs://; a bundle has none")
    split: Literal["held_out", "train"] = Field("held_out", description="which clips of it")
    frames: Annotated[int, Field(gt=0, le=1_000_001)] | None = Field(
        None, description="video frames of a clip, 4n + 1; a bundle has none"
    )
    size: tuple[Side, Side] | None = Field(
        None, description="height, width that they are scaled and cropped to; of a bundle None is as stored"
    )


@config
class EvaluateConfig:
    """Of experiments.evaluate. How it samples is the world's own where a field is None."""

    run: Path = Field(description="a run or a bundle")
    out: Path = Field(description="folder to write; what it held of an earlier evaluation is replaced")
    data: ClipsConfig = Field(ClipsConfig(), description="the clips")
    clips: Annotated[int, Field(ge=2, le=2**20)] = Field(
        64, description="how many, of those in which something moves"
    )
    batch: Annotated[int, Field(gt=0, le=65536)] = Field(32, description="clips generated at a time")
    shown: Annotated[int, Field(gt=0, le=1024)] = Field(6, description="clips in the video and the sheet")
    steps: Annotated[int, Field(gt=0, le=1000)] | None = Field(None, description="denoising steps")
    shift: Annotated[Positive, Field(le=1000)] | None = Field(None, description="of the schedule")
    solver: SolverName | None = Field(None, description="ODE solver")
    guidance: tuple[Scale, Scale] | None = Field(
        None, description="scales of the low-noise and the high-noise expert; 1 is off"
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="of the parameters; None: as they are stored"
    )
    seed: Seed = Field(0, description="of the noise")

    def __post_init__(self):
        require(self.shown <= self.clips, "shown", self.shown, f"must be at most clips = {self.clips}")
