"""The one description of a world. A run's config contains it; a bundle's `bundle.json` is it."""

from typing import Annotated, Literal

from pydantic import Field

from lingbot_jax.config import ConfigError, Inside, Positive, Text, config, require
from lingbot_jax.control import keyboard
from lingbot_jax.diffusion import schedule as schedules
from lingbot_jax.diffusion.guidance import Guidance
from lingbot_jax.diffusion.solvers import SolverName
from lingbot_jax.models.config import CodecConfig, DiTConfig, TextConfig

BOUNDARY = 0.947  # of the published model, as a noise fraction
EXPERTS = ("high", "low")  # names of the two networks of a world of noise experts (paper section 3.2.1)
Caption = Literal["narrative", "static", "scene"]


@config
class PoseConfig:
    """How camera poses become the camera embedding (published worlds use previous and max_norm)."""

    reference: Literal["first", "previous"] = Field(
        "previous", description="poses relative to the first latent frame, or each to the one before"
    )
    translation: Literal["max_norm", "metric"] = Field(
        "max_norm",
        description="divide a clip's translations by the largest (recordings without a scale), or keep them",
    )


@config
class KeyboardConfig:
    """What a key does per video frame (docs/control.md)."""

    step_size: Annotated[Positive, Field(le=1e6)] = Field(
        keyboard.STEP, description="world units of a movement key"
    )
    turn_rate: Annotated[Positive, Field(le=180)] = Field(
        keyboard.DEGREES, description="degrees of a looking key"
    )


@config
class SampleConfig:
    """How a whole clip is sampled. Defaults are the published base model's."""

    steps: Annotated[int, Field(gt=0, le=1000)] = Field(70, description="denoising steps")
    shift: Annotated[Positive, Field(le=1000)] = Field(
        10.0, description="of the schedule; 3 is the advice for 480p with few steps"
    )
    solver: SolverName = Field("unipc", description="ODE solver")
    guidance: Guidance = Field(Guidance(), description="classifier-free guidance")
    negative_prompt: Text = Field(
        "", description="text of the unconditional branch; used where a scale is not 1"
    )


@config
class CausalConfig:
    """How a causal world generates chunks. Defaults are the published fast model's, with its successor's window."""

    chunk: Annotated[int, Field(gt=0, le=4096)] = Field(3, description="latent frames generated at once")
    window: Annotated[int, Field(gt=0, le=65536)] | None = Field(
        18, description="latent frames that a chunk sees, itself and the sink included; None: all of the clip"
    )
    sink: Annotated[int, Field(ge=0, le=65536)] = Field(
        6, description="first latent frames of the clip that every chunk sees; part of the window"
    )
    positions: Literal["absolute", "relative"] = Field(
        "relative", description="of the clip (as published) or in the window; play without end needs relative"
    )
    schedule: Literal["fast", "warped"] = Field(
        "fast",
        description="levels are indices of the 1000-step schedule (published), or counts of 1000, shifted",
    )
    levels: tuple[Annotated[int, Field(ge=0, le=1000)], ...] = Field(
        (0, 179, 358, 679), description="noise levels, see schedule"
    )
    shift: Annotated[Positive, Field(le=1000)] = Field(5.0, description="of the schedule")
    context_noise: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = Field(
        0.0, description="timestep of the cache-update pass"
    )
    sample: SampleConfig | None = Field(
        None,
        description="many steps per chunk, guided, in place of levels: a causal world that was not distilled",
    )

    def __post_init__(self):
        require(1 <= len(self.levels) <= 64, "levels", self.levels, "must name 1 to 64 levels")
        if self.window is None:
            require(self.sink == 0, "sink", self.sink, "means nothing without window")
        else:
            least = self.sink + self.chunk
            require(
                self.window >= least, "window", self.window, f"must hold sink + chunk = {least} latent frames"
            )
        self.few_steps()
        if self.sample is not None:
            scales = (self.sample.guidance.low, self.sample.guidance.high)
            require(
                scales[0] == scales[1], "sample.guidance", scales, "must be equal: a chunk has one network"
            )

    @property
    def guided(self) -> bool:
        """Whether every pass has an unconditional branch, with a cache of its own."""
        return self.sample is not None and self.sample.guidance.guided

    @property
    def draws(self) -> int:
        """Draws of noise per chunk."""
        return len(self.levels) if self.sample is None else 1

    def few_steps(self) -> schedules.FewSteps:
        make = {"fast": schedules.fast, "warped": schedules.warped}[self.schedule]
        return make(self.shift, self.levels)


@config
class WorldConfig:
    """Everything that a world is, besides its arrays."""

    networks: dict[str, DiTConfig] = Field(
        default_factory=dict,
        description="transformers by name: `world`, or `high` and `low` noise experts; empty: those of init",
    )
    codec: CodecConfig | None = Field(None, description="video to latents and back; None: as the source says")
    text: TextConfig | None = Field(None, description="the text encoder; None: as the source says")
    pose: PoseConfig = Field(PoseConfig(), description="how camera poses are seen")
    keyboard: KeyboardConfig = Field(KeyboardConfig(), description="what keys do to the camera")
    boundary: Inside = Field(BOUNDARY, description="noise level from which on the expert `high` is used")
    null_text: Text = Field("", description="the text that stands for no text, in training and in guidance")
    caption: Caption = Field(
        "static",
        description="the caption of a clip that is its prompt; static leaves motion to control, scene adds what has "
        "come to be by the end of the clip (weather)",
    )
    sample: SampleConfig | None = Field(
        None, description="how whole clips are sampled; None: not a world of that kind"
    )
    causal: CausalConfig | None = Field(
        None, description="how chunks are generated; None: not a world of that kind"
    )

    def __post_init__(self):
        names = set(self.networks)
        known = (set(), {"world"}, {"high", "low"}, {"high"}, {"low"})
        require(names in known, "networks", sorted(names), "must be high and low, one of them, or world")
        for name, network in self.networks.items():
            for field, theirs in _shared(self.codec, self.text).items():
                own = getattr(network, field)
                require(
                    own == theirs[0], f"networks.{name}.{field}", own, f"must be {theirs[0]}, {theirs[1]}"
                )
        if len(names) == 2 and self.networks["high"] != self.networks["low"]:
            differ = [
                f
                for f in vars(self.networks["high"])
                if getattr(self.networks["high"], f) != getattr(self.networks["low"], f)
            ]
            raise ConfigError(
                f"networks.low.{differ[0]} = {getattr(self.networks['low'], differ[0])!r}: must be as of networks.high"
            )

    @property
    def network(self) -> DiTConfig:
        """The config of any network: two experts have the same. Raises ConfigError without one."""
        require(bool(self.networks), "networks", {}, "the world has no transformer")
        return next(iter(self.networks.values()))

    def region(self, network: str) -> tuple[float, float]:
        """Noise levels (lo, hi) that a network is trained on and used for."""
        return {"high": (self.boundary, 1.0), "low": (0.0, self.boundary)}.get(network, (0.0, 1.0))

    def check_complete(self, where: str) -> None:
        """Raises ConfigError unless codec, text encoder and a transformer are described; `where`: to name."""
        for name in ("networks", "codec", "text"):
            if not getattr(self, name):
                raise ConfigError(f"{where}: has no {name}; convert a whole checkpoint (experiments.convert)")


def _shared(codec: CodecConfig | None, text: TextConfig | None) -> dict[str, tuple[int, str]]:
    """Sizes that a transformer shares with its codec and text encoder: field -> (value, whose it is)."""
    found = {}
    if codec is not None:
        st, sh, sw = codec.stride
        require(sh == sw, "codec", codec.stride, "the stride of height and width must be equal")
        found |= {"latent_channels": (codec.channels, "the codec's channels")}
        found |= {
            "mask_channels": (st, "the codec's stride in time"),
            "spatial_stride": (sh, "the codec's stride in space"),
        }
    if text is not None:
        found |= {
            "text_dim": (text.dim, "the text encoder's width"),
            "text_len": (text.length, "the text encoder's length"),
        }
    return found


def pixels_per_token(network: DiTConfig) -> tuple[int, int]:
    """(height, width) in pixels of what a token covers: sizes of video are multiples of it."""
    return tuple(network.spatial_stride * p for p in network.patch[1:])
