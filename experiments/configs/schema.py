"""Configs of the experiments that have no module of their own in the package."""

from typing import Annotated, Literal

from pydantic import Field

from lingbot_jax.config import Count, NonNegative, Path, Positive, PositiveInt, Seed, config, require
from lingbot_jax.data.config import DataConfig
from lingbot_jax.data.latents import Caption, Conditioning, CropFrames, Side, Stored
from lingbot_jax.diffusion.guidance import Scale
from lingbot_jax.diffusion.solvers import SolverName
from lingbot_jax.models.config import ConvCodecConfig, LinearCodecConfig, TextConfig
from lingbot_jax.parallel.mesh import MeshConfig


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
class EncodeConfig:
    """Of experiments.encode."""

    out: Path = Field(description="folder of the latents, local or gs://")
    data: DataConfig = Field(description="the clips: path, frames of a crop, and batch, how many at a time")
    codec: Path = Field(description="bundle or run that codec and text encoder are read from")
    text: TextConfig | None = Field(None, description="the text encoder; None: as codec has it")
    grid: CropFrames | None = Field(
        None,
        description="frames between the first frames of two crops of a clip; None: data.frames, no overlap",
    )
    size: tuple[Side, Side] | None = Field(
        None, description="height, width that video is scaled and cropped to; None: as stored"
    )
    conditioning: Conditioning = Field(
        5, description="latent conditioning frames at most, as tasks.max_conditioning_frames"
    )
    captions: Annotated[tuple[Caption, ...], Field(min_length=1)] = Field(
        ("static",),
        description="the captions that are encoded: world.caption of every run that is to read them",
    )
    temporal: bool = Field(
        False, description="also with each temporal caption behind them, as tasks.caption = temporal needs"
    )
    dtype: Stored | None = Field(
        None, description="that latents are stored in; None: float16 of a codec that computes in bfloat16"
    )
    chunk: PositiveInt = Field(8, description="latent frames that go through the codec at a time")
    text_bytes: Annotated[int, Field(ge=0, le=2**40)] = Field(
        2**30, description="of encoded texts kept in memory; a text that is kept is not encoded again"
    )
    mesh: MeshConfig = Field(MeshConfig(), description="how the devices of a process share the crops")

    def __post_init__(self):
        given = self.data.mixture
        require(
            not given, "data.mixture", given, "must be empty: encode each data set into a folder of its own"
        )


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


@config
class CompareConfig:
    """Of experiments.compare."""

    teacher: Path = Field(description="the run that was distilled: bidirectional, many steps")
    causal: Path = Field(description="the causal run before distillation")
    distilled: Path = Field(description="the run of stage distill")
    path: Path = Field(description="folder of a data set with held-out clips that are long enough")
    out: Path = Field(description="folder to write")
    frames: Annotated[int, Field(gt=1, le=100_001)] = Field(
        129, description="video frames of a clip: whole chunks, as long as the table is to reach"
    )
    clips: Annotated[int, Field(ge=1, le=4096)] = Field(8, description="how many are generated")
    found: Annotated[int, Field(ge=1, le=65536)] = Field(
        12, description="held-out clips that they are taken from: those whose scene stays as it is"
    )
    overlap: PositiveInt = Field(5, description="teacher: frames that a window takes over, 4n + 1")
    plays: Annotated[int, Field(ge=1, le=1024)] = Field(4, description="long walks of each causal model")
    seconds: Annotated[Positive, Field(le=36000)] = Field(60.0, description="of a long walk")
    fps: Annotated[Positive, Field(le=1000)] = Field(16.0, description="video frames per second")
    shown: Annotated[int, Field(gt=0, le=64)] = Field(3, description="clips in the video and the sheet")

    def __post_init__(self):
        for name in ("plays", "shown"):
            value = getattr(self, name)
            require(value <= self.clips, name, value, f"must be at most clips = {self.clips}")
