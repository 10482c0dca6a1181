"""The configs of the post-training stages `causal` and `distill` (paper section 3.4)."""

from typing import Annotated, Literal

from pydantic import Field

from lingbot_jax.config import Below1, NonNegative, Positive, PositiveInt, config, require
from lingbot_jax.diffusion.distill import ScoreConfig
from lingbot_jax.models.discriminator import DiscriminatorConfig
from lingbot_jax.rollout.trajectory import TrajectoryConfig


@config
class ForcingConfig:
    """Stage `causal`: what past a noisy chunk has while it learns, and how its error counts."""

    method: Literal["diffusion_forcing", "teacher_forcing", "ode"] = Field(
        "diffusion_forcing",
        description="the past of a chunk is at noise levels of its own (paper), or a clean copy of the clip; ode: as "
        "the first, on the teacher's trajectories in place of noised clips",
    )
    corruption: Below1 = Field(
        0.0,
        description="largest noise level of a past that is told to be clean, uniform from 0 per chunk: what a student "
        "makes is never as clean as a recording",
    )
    trajectory: TrajectoryConfig = Field(TrajectoryConfig(), description="of ode")
    weighting: Literal["x0", "velocity"] = Field(
        "x0",
        description="error of the clean latent (paper Eq. 2: sigma^2 times that of the velocity), or of the velocity",
    )
    clean: Below1 = Field(
        0.25, description="share of chunks at t = 0, which teach as context alone (not of teacher_forcing)"
    )


@config
class DistillConfig:
    """Stage `distill`: the student's rollouts, what compares them with the teacher, and how often who is updated.

    Lengths are in chunks. A rollout has `shortest` to all chunks of a clip, drawn per step, so that the range grows
    with the frames of the curriculum's phases.
    """

    critic_steps: Annotated[int, Field(gt=0, le=1000)] = Field(
        5,
        description="updates of the fake scores per update of the student; a step of the run is one of them",
    )
    critic_rate: Annotated[Positive, Field(le=1000)] = Field(
        0.2,
        description="learning rates of the fake scores and the head, as a share of the student's (optimizer)",
    )
    shortest: PositiveInt = Field(7, description="chunks of the shortest rollout")
    exit_step: Literal["drawn", "last"] = Field(
        "drawn",
        description="whose prediction becomes the clean chunk: drawn per step of training, or the last, as in play",
    )
    window: PositiveInt = Field(
        7, description="chunks at the end of a rollout that the scores see, as a clip of its own"
    )
    gradient_chunks: PositiveInt = Field(
        7, description="last chunks of a rollout that carry the gradient (K in the paper)"
    )
    gradient: Literal["cache", "replay"] = Field(
        "cache",
        description="its path: each chunk's exit pass before the cache (paper), or one block-causal pass over what the "
        "rollout made, in which clean keys and values learn too",
    )
    condition: Literal["frame", "latent"] = Field(
        "frame",
        description="image that a window begins with, where it does not begin at the clip's: its first latent frame "
        "decoded and the last video frame of that encoded, or that latent frame as it is",
    )
    scores: ScoreConfig = Field(ScoreConfig(), description="noise levels and guidance of the scores")
    head: DiscriminatorConfig | None = Field(None, description="the adversarial head; None: none")
    adversarial: Annotated[NonNegative, Field(le=1000)] = Field(
        0.05, description="weight of the student's adversarial loss; of no meaning without a head"
    )

    def __post_init__(self):
        fits = f"must be at most window = {self.window}"
        require(self.gradient_chunks <= self.window, "gradient_chunks", self.gradient_chunks, fits)
        fits = f"must hold window = {self.window} chunks"
        require(self.shortest >= self.window, "shortest", self.shortest, fits)
