"""The training experiment as frozen dataclasses. Every field is read; an unknown one is refused."""

import dataclasses
from typing import Literal

from lingbot_jax.config import ConfigError, DiTConfig, require
from lingbot_jax.data.loader import LoaderConfig
from lingbot_jax.models.codec import CodecConfig
from lingbot_jax.parallel.mesh import MeshConfig

Stage = Literal["world", "action"]
Expert = Literal["single", "high", "low", "both"]
EXPERTS: tuple[Expert, ...] = ("high", "low")


@dataclasses.dataclass(frozen=True)
class PoseConfig:
    """How camera poses become control (FACTS: published worlds use previous and max_norm).

    Attributes:
      reference: poses relative to the first latent frame of the clip, or each to the one before.
      translation: `max_norm` divides a clip's translations by the largest (scale-free recordings);
        `metric` keeps them (one game, one scale).
    """

    reference: Literal["first", "previous"] = "previous"
    translation: Literal["max_norm", "metric"] = "max_norm"


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """The multi-task mixture (paper section 3.3.1) and dropout of conditions for guidance.

    Attributes:
      continuation: probability that a sample continues given frames instead of a single image.
      max_given: latent frames given at most in a continuation; uniform in 2..max_given.
      caption: which caption of a clip is its prompt; `static` leaves all motion to the control.
      text_dropout, control_dropout: probability that a sample's text or control is zeroed.
    """

    continuation: float = 0.3
    max_given: int = 5
    caption: Literal["narrative", "static"] = "static"
    text_dropout: float = 0.1
    control_dropout: float = 0.0

    def __post_init__(self):
        for name in ("continuation", "text_dropout", "control_dropout"):
            require(0 <= getattr(self, name) <= 1, f"tasks.{name}", getattr(self, name), "must be in [0, 1]")
        require(self.max_given >= 2, "tasks.max_given", self.max_given, "must be at least 2 latent frames")


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Attributes:
    shift: of the timestep distribution, in training and (unless the user says otherwise) in sampling.
    boundary: noise level where the high-noise expert takes over; one field for training and sampling.
    """

    shift: float = 5.0
    boundary: float = 0.947

    def __post_init__(self):
        require(self.shift > 0, "flow.shift", self.shift, "must be positive")
        require(0 < self.boundary < 1, "flow.boundary", self.boundary, "must be between 0 and 1")

    def region(self, expert: Expert) -> tuple[float, float]:
        """Noise levels that an expert is trained on."""
        return {"high": (self.boundary, 1.0), "low": (0.0, self.boundary)}.get(expert, (0.0, 1.0))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Linear warm-up, then constant or cosine to zero at the last step; gradients clipped by global norm.

    Attributes:
      algorithm: `adamw`, or `muon`: orthogonalised momentum for the matrices of the blocks and AdamW for the
        rest. Muon learns small worlds from scratch in about half the steps.
      learning_rate: of AdamW. muon_rate: of Muon, in spectral norm (0.02 is its usual value).
    """

    algorithm: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-5
    muon_rate: float = 0.02
    warmup: int = 100
    decay: Literal["constant", "cosine"] = "constant"
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    accumulate: int = 1

    def __post_init__(self):
        require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "must be positive")
        require(self.accumulate > 0, "optimizer.accumulate", self.accumulate, "must be positive")
        require(0 <= self.ema < 1, "optimizer.ema", self.ema, "must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Attributes:
    every: steps between checkpoints. keep: newest checkpoints kept; 2 or more, so that one cut off is survived.
    """

    every: int = 500
    keep: int = 3

    def __post_init__(self):
        require(self.every > 0, "checkpoint.every", self.every, "must be positive")
        require(self.keep >= 2, "checkpoint.keep", self.keep, "must be at least 2")


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of steps of the curriculum (`curriculum.py`); what it leaves out is the run's own.

    Attributes:
      until: the step after which it ends; it begins where the one before it ends.
      frames, batch: of a window, and windows a process. path: data set, for phases that need longer clips.
      size: height and width of the video. shift: of the timestep distribution; rises with duration.
      accumulate: parts a batch is computed in. mesh: how the devices share the work; `seq` rises with frames.
    """

    until: int
    frames: int | None = None
    batch: int | None = None
    path: str | None = None
    size: tuple[int, int] | None = None
    shift: float | None = None
    accumulate: int | None = None
    mesh: MeshConfig | None = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
      run: the run directory; running the same command again resumes it.
      stage: `world` trains every parameter; `action` the control adapters only (paper section 3.3.2).
      codec: a codec file, or a converted bundle whose VAE and text encoder are used.
      expert: which noise region is trained; `both` holds two experts and trains one at each step.
      init: where parameters come from: a run directory (averaged parameters) or a converted bundle; for `both`
        also two of them, "HIGH,LOW". Control adapters that it does not have start fresh.
      size: height and width that the recorded video is scaled and cropped to; (0, 0): as recorded.
      mesh: how the devices share the work; may change when a run is resumed.
      curriculum: phases by step; empty: one phase, of the fields above. log_every: steps between lines in
        metrics.jsonl.
    """

    run: str
    stage: Stage
    steps: int
    model: DiTConfig
    data: LoaderConfig
    codec: str
    seed: int = 0
    expert: Expert = "single"
    init: str | None = None
    pose: PoseConfig = PoseConfig()
    tasks: TaskConfig = TaskConfig()
    flow: FlowConfig = FlowConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    size: tuple[int, int] = (0, 0)
    mesh: MeshConfig = MeshConfig()
    curriculum: tuple[Phase, ...] = ()
    log_every: int = 10

    def __post_init__(self):
        require(self.steps > 0, "steps", self.steps, "must be positive")
        require(self.log_every > 0, "log_every", self.log_every, "must be positive")
        require(
            self.data.batch % self.optimizer.accumulate == 0,
            "optimizer.accumulate",
            self.optimizer.accumulate,
            f"must divide data.batch = {self.data.batch}",
        )
        require(
            self.stage != "action" or self.model.control != "none",
            "model.control",
            self.model.control,
            "stage action trains the control adapters: choose cam, act or cam_act",
        )
        pixels = self.model.spatial_stride * self.model.patch[1]
        require(
            self.size == (0, 0) or (min(self.size) > 0 and not any(s % pixels for s in self.size)),
            "size",
            self.size,
            f"must be (0, 0), or multiples of {pixels} = model.spatial_stride x model.patch",
        )
        ends = [0, *(phase.until for phase in self.curriculum)]
        require(
            ends == sorted(set(ends)), "curriculum", tuple(ends[1:]), "until must rise from phase to phase"
        )
        require(
            len(ends) == 1 or ends[-1] >= self.steps,
            "curriculum",
            tuple(ends[1:]),
            f"the last until must reach steps = {self.steps}",
        )
        self.phases()

    def phases(self) -> "tuple[TrainConfig, ...]":
        """The run as each phase of its curriculum sees it: a run of that phase alone.

        Raises:
          ConfigError: a phase whose values do not fit each other or the run.
        """
        found = []
        for index, phase in enumerate(self.curriculum):
            say = lambda given, own: own if given is None else given
            try:
                data = dataclasses.replace(
                    self.data,
                    path=say(phase.path, self.data.path),
                    frames=say(phase.frames, self.data.frames),
                    batch=say(phase.batch, self.data.batch),
                    seed=self.data.seed + index,  # every phase has an order of its own
                )
                accumulate = say(phase.accumulate, self.optimizer.accumulate)
                made = dataclasses.replace(
                    self,
                    data=data,
                    size=say(phase.size, self.size),
                    flow=dataclasses.replace(self.flow, shift=say(phase.shift, self.flow.shift)),
                    optimizer=dataclasses.replace(self.optimizer, accumulate=accumulate),
                    mesh=say(phase.mesh, self.mesh),
                    curriculum=(),
                )
            except ConfigError as error:
                raise ConfigError(f"curriculum[{index}]: {error}") from None
            found.append(made)
        return tuple(found) or (self,)

    def check_codec(self, codec: CodecConfig) -> None:
        """Refuses a codec that does not fit the model or the windows. Raises ConfigError."""
        model = self.model
        require(
            codec.channels == model.latent_channels,
            "model.latent_channels",
            model.latent_channels,
            f"the codec {self.codec} has {codec.channels}",
        )
        require(
            codec.stride[0] == model.mask_channels,
            "model.mask_channels",
            model.mask_channels,
            f"must be the codec's temporal stride {codec.stride[0]}",
        )
        require(
            codec.stride[1] == codec.stride[2] == model.spatial_stride,
            "model.spatial_stride",
            model.spatial_stride,
            f"the codec's spatial stride is {codec.stride[1:]}",
        )
        for phase in self.phases():
            frames = phase.data.frames
            require(frames % codec.stride[0] == 1, "data.frames", frames, f"must be {codec.stride[0]}n + 1")
            latent = codec.latent_frames(frames)
            require(
                self.tasks.max_given < latent,
                "tasks.max_given",
                self.tasks.max_given,
                f"must leave something to predict of {latent} latent frames",
            )
