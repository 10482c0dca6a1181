"""The config of a training run. Every field is read; an unknown one is refused."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from lingbot_jax.config import (
    Below1,
    ConfigError,
    Count,
    Fraction,
    NonNegative,
    Path,
    Positive,
    PositiveInt,
    Seconds,
    Seed,
    config,
    require,
)
from lingbot_jax.data.config import DataConfig, MixtureConfig
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.lora import LoraConfig
from lingbot_jax.parallel.mesh import MeshConfig
from lingbot_jax.training.post_training import DistillConfig, ForcingConfig
from lingbot_jax.training.wandb_run import WandbConfig
from lingbot_jax.worlds.config import EXPERTS, WorldConfig, pixels_per_token

Stage = Literal["world", "action", "causal", "distill"]
POST_TRAINING = ("causal", "distill")  # stages of one causal network, the student, whose name is `world`
STUDENT = "world"
Pixels = Annotated[int, Field(ge=0, le=16384)]
Shift = Annotated[Positive, Field(le=1000)]
Rate = Annotated[Positive, Field(le=10)]


@config
class TaskConfig:
    """The multi-task mixture (paper section 3.3.1) and dropout of conditions for guidance."""

    continuation: Fraction = Field(
        0.3, description="share of samples that continue several frames, not one image"
    )
    max_conditioning_frames: Annotated[int, Field(ge=2, le=4096)] = Field(
        5, description="latent conditioning frames of a continuation at most; uniform in 2..max"
    )
    text_dropout: Fraction = Field(
        0.1, description="share of samples whose text is replaced by world.null_text"
    )
    control_dropout: Fraction = Field(0.0, description="share of samples whose camera embedding is zeroed")
    caption: Literal["clip", "temporal"] = Field(
        "clip",
        description="text that a chunk sees: world.caption, or that with what happens in the chunk's own interval",
    )


@config
class FlowConfig:
    """Flow matching."""

    shift: Shift = Field(
        5.0, description="of the timestep distribution in training; sampling has world.sample.shift"
    )


@config
class OptimizerConfig:
    """Linear warm-up, then constant or cosine to zero; gradients clipped by global norm."""

    algorithm: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: orthogonalised momentum for matrices of blocks, AdamW for the rest"
    )
    learning_rate: Rate = Field(1e-5, description="of AdamW")
    muon_rate: Rate = Field(0.02, description="of Muon, in spectral norm")
    warmup: Count = Field(100, description="steps of linear warm-up")
    decay: Literal["constant", "cosine"] = Field("constant", description="after the warm-up")
    decay_steps: PositiveInt | None = Field(
        None,
        description="step at which cosine reaches zero; None: steps, which then may not change on resume",
    )
    b1: Below1 = Field(0.9, description="of AdamW: decay of the first moment")
    b2: Below1 = Field(0.999, description="of AdamW: decay of the second moment")
    weight_decay: Annotated[NonNegative, Field(le=100)] = Field(0.01, description="of matrices")
    clip: Positive = Field(1.0, description="largest global norm of a gradient")
    ema: Below1 = Field(0.999, description="decay of the averaged parameters")
    grad_accum_steps: Annotated[int, Field(gt=0, le=65536)] = Field(
        1, description="parts a batch is computed in"
    )


@config
class CheckpointConfig:
    """When a run is saved."""

    every: PositiveInt = Field(500, description="steps between checkpoints")
    every_minutes: Annotated[Positive, Field(le=10**5)] | None = Field(
        30.0,
        description="after which the next step is saved too, and a new run's first step; None: by steps alone",
    )
    keep: Annotated[int, Field(ge=2, le=10**6)] = Field(
        3, description="newest checkpoints kept; 2 or more, so that a damaged one is survived"
    )
    grace_seconds: Seconds = Field(
        30.0, description="between SIGTERM and the end of a process; a run that needs more to save warns"
    )


@config
class WatchdogConfig:
    """How long the loop may wait before it counts as stuck: the process shows its stacks and ends (code 124)."""

    step_seconds: Seconds | None = Field(
        3600.0,
        description="for a step, the compilation of its program included, here or on another host; None: ever",
    )
    data_seconds: Seconds | None = Field(1800.0, description="for the clips of a step; None: ever")


@config
class ValidationConfig:
    """The evaluation value of a run, measured while it trains (`experiments.train`)."""

    every: Count = Field(0, description="steps between measurements; 0: none")
    clips: Annotated[int, Field(ge=2, le=65536)] = Field(8, description="held-out clips generated each time")


@config
class Phase:
    """A stretch of steps of the curriculum (`curriculum.py`); what it leaves out is the run's own."""

    end_step: PositiveInt = Field(
        description="the step it ends after; it begins where the one before it ends"
    )
    frames: PositiveInt | None = Field(None, description="video frames of a crop")
    batch: PositiveInt | None = Field(None, description="clips per step")
    path: Path | None = Field(
        None, description="data set, for phases that need longer clips; alone, unless mixture is given too"
    )
    mixture: tuple[MixtureConfig, ...] | None = Field(None, description="data sets beside path")
    size: tuple[Pixels, Pixels] | None = Field(None, description="height and width of the video")
    shift: Shift | None = Field(None, description="of the timestep distribution; rises with duration")
    grad_accum_steps: PositiveInt | None = Field(None, description="parts a batch is computed in")
    mesh: MeshConfig | None = Field(None, description="how the devices share the work; seq rises with frames")


@config
class TrainConfig:
    """One training run."""

    run: Path = Field(description="run directory, local or gs://; the same command again resumes it")
    stage: Stage = Field(
        description="world trains every parameter; action the camera and key adapters (paper 3.3); causal makes the "
        "world generate chunk after chunk (3.4.1), distill in few steps and from its own past (3.4.2)"
    )
    steps: PositiveInt = Field(description="updates in all; of stage distill, of the critic")
    data: DataConfig = Field(description="the clips")
    world: WorldConfig = Field(
        WorldConfig(), description="the world that is trained; what it leaves out is init's"
    )
    codec: Path | None = Field(
        None, description="codec file, bundle or run that codec and text encoder are read from; None: init"
    )
    init: Path | None = Field(
        None,
        description="where parameters start: a run or bundle, or NAME=SOURCE,... by network; None: at random. Adapters "
        "that it lacks start fresh",
    )
    teacher: Path | None = Field(
        None,
        description="run or bundle of the bidirectional world that distill and forcing.method = ode learn from",
    )
    teachers: dict[str, DiTConfig] = Field(
        default_factory=dict,
        description="its networks: `world`, or `high` and `low`; empty: those of teacher",
    )
    seed: Seed = Field(0, description="of initialisation, noise and dropout")
    tasks: TaskConfig = Field(TaskConfig(), description="mixture of tasks")
    flow: FlowConfig = Field(FlowConfig(), description="flow matching")
    forcing: ForcingConfig = Field(ForcingConfig(), description="of stage causal")
    distill: DistillConfig = Field(DistillConfig(), description="of stage distill")
    lora: LoraConfig = Field(
        LoraConfig(), description="low-rank adapters of the world's networks, which alone train then"
    )
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="updates")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="saving")
    validation: ValidationConfig = Field(ValidationConfig(), description="measuring while training")
    watchdog: WatchdogConfig = Field(WatchdogConfig(), description="bounds of waiting")
    size: tuple[Pixels, Pixels] = Field(
        (0, 0), description="height, width video is scaled and cropped to; 0, 0: as stored"
    )
    mesh: MeshConfig = Field(MeshConfig(), description="how the devices share the work")
    curriculum: tuple[Phase, ...] = Field((), description="phases by step; empty: one, of the fields above")
    log_every: PositiveInt = Field(10, description="steps between lines of metrics.jsonl")
    wandb: WandbConfig = Field(WandbConfig(), description="metrics in Weights & Biases too")

    def __post_init__(self):
        parts = self.optimizer.grad_accum_steps
        ok = self.data.batch % parts == 0
        require(ok, "optimizer.grad_accum_steps", parts, f"must divide data.batch = {self.data.batch}")
        given = self.codec is not None or self.init is not None
        require(given, "codec", None, "give the file, bundle or run that the codec is read from")
        given = bool(self.world.networks) or self.init is not None
        require(given, "world.networks", {}, "give sizes, or a source with init")
        ok = self.lora.rank == 0 or self.init is not None
        require(ok, "lora.rank", self.lora.rank, "adapts what is there already: name it with init")
        ok = self.optimizer.decay == "cosine" or self.optimizer.decay_steps is None
        require(
            ok, "optimizer.decay_steps", self.optimizer.decay_steps, "means nothing without decay = cosine"
        )
        for name, network in self.world.networks.items():
            field = f"world.networks.{name}.control"
            ok = self.stage != "action" or network.control != "none"
            require(ok, field, network.control, "stage action trains adapters: choose cam, act or cam_act")
            pixels = pixels_per_token(network)
            ok = self.size == (0, 0) or all(
                s > 0 and s % p == 0 for s, p in zip(self.size, pixels, strict=True)
            )
            require(
                ok, "size", self.size, f"must be (0, 0), or multiples of {pixels} = spatial_stride x patch"
            )
        self._check_post_training()
        ends = [0, *(phase.end_step for phase in self.curriculum)]
        require(
            ends == sorted(set(ends)), "curriculum", tuple(ends[1:]), "end_step must rise from phase to phase"
        )
        reaches = len(ends) == 1 or ends[-1] >= self.steps
        require(reaches, "curriculum", tuple(ends[1:]), f"the last end_step must reach steps = {self.steps}")
        self.phases()

    def _check_post_training(self) -> None:
        names, post = sorted(self.world.networks), self.stage in POST_TRAINING
        if not post:
            given = self.tasks.caption
            require(
                given == "clip", "tasks.caption", given, "text by interval needs the chunks of a causal stage"
            )
            return
        require(
            names in ([], [STUDENT]), "world.networks", names, f"stage {self.stage} has `{STUDENT}` alone"
        )
        every = self.validation.every
        require(every == 0, "validation.every", every, "must be 0: a causal world samples no whole clips")
        require(self.world.causal, "world.causal", None, f"stage {self.stage} trains for it: describe it")
        if self.needs_teacher:
            given = self.teacher is not None or bool(self.teachers)
            require(given, "teacher", None, "give the run or the bundle to learn from")
            names = sorted(self.teachers)
            known = ([], ["world"], ["high", "low"])
            require(names in known, "teachers", names, "must be world, or high and low")
        many = self.world.causal.sample
        require(many is None, "world.causal.sample", many, "must be None: a student has few steps")
        if self.stage == "distill":
            share = self.tasks.continuation
            require(
                share == 0,
                "tasks.continuation",
                share,
                "must be 0: rollouts begin with one image, as play does",
            )

    def phases(self) -> "tuple[TrainConfig, ...]":
        """The run as each phase of its curriculum sees it: a run of that phase alone.

        Raises:
          ConfigError: a phase whose values do not fit each other or the run.
        """
        found = []
        for index, phase in enumerate(self.curriculum):
            say = lambda given, own: own if given is None else given
            mixture = say(phase.mixture, self.data.mixture if phase.path is None else ())
            try:
                data = dataclasses.replace(
                    self.data,
                    path=say(phase.path, self.data.path),
                    weight=self.data.weight if mixture else 1.0,
                    mixture=mixture,
                    frames=say(phase.frames, self.data.frames),
                    batch=say(phase.batch, self.data.batch),
                    seed=(self.data.seed + index) % 2**32,  # every phase has an order of its own
                )
                parts = say(phase.grad_accum_steps, self.optimizer.grad_accum_steps)
                made = dataclasses.replace(
                    self,
                    data=data,
                    size=say(phase.size, self.size),
                    flow=FlowConfig(shift=say(phase.shift, self.flow.shift)),
                    optimizer=dataclasses.replace(self.optimizer, grad_accum_steps=parts),
                    mesh=say(phase.mesh, self.mesh),
                    curriculum=(),
                )
            except ConfigError as error:
                raise ConfigError(f"curriculum[{index}].{error}") from None
            found.append(made)
        return tuple(found) or (self,)

    @property
    def experts(self) -> bool:
        """Whether the run holds both noise experts and trains them in turn."""
        return set(self.world.networks) == set(EXPERTS)

    @property
    def needs_teacher(self) -> bool:
        return self.stage == "distill" or (self.stage == "causal" and self.forcing.method == "ode")

    @property
    def intervals(self) -> int | None:
        """Texts that a clip has, one per chunk; None: one text for all of it."""
        if self.tasks.caption == "clip":
            return None
        return self.world.codec.latent_frames(self.data.frames) // self.world.causal.chunk

    def check_crops(self) -> None:
        """Refuses crops that do not fit the world's codec or leave nothing to predict. Raises ConfigError."""
        codec = self.world.codec
        for index, phase in enumerate(self.phases()):
            where = f"config.curriculum[{index}].frames" if self.curriculum else "config.data.frames"
            st = codec.stride[0]
            require(phase.data.frames % st == 1 % st, where, phase.data.frames, f"must be {st}n + 1")
            latent = codec.latent_frames(phase.data.frames)
            most = self.tasks.max_conditioning_frames if self.tasks.continuation > 0 else 1
            fits = (
                f"must leave something to predict of {latent} latent frames ({where} = {phase.data.frames})"
            )
            require(most < latent, "config.tasks.max_conditioning_frames", most, fits)
            if self.stage in POST_TRAINING:
                chunk = self.world.causal.chunk
                whole = f"gives {latent} latent frames: must be a multiple of world.causal.chunk = {chunk}"
                require(latent % chunk == 0, where, phase.data.frames, whole)
            if self.stage == "distill":
                longest = latent // chunk
                fits = f"must be at most the {longest} chunks of {where} = {phase.data.frames}"
                require(
                    self.distill.shortest <= longest, "config.distill.shortest", self.distill.shortest, fits
                )
