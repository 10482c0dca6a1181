"""Bidirectional sampling: a whole clip from noise, image-to-video or continuing given frames.

All denoising steps are one compiled program. The steps of the high-noise expert come first and those of the
low-noise expert follow, at a place known when tracing, so each expert is a `lax.scan` of its own: nothing is
routed at run time. What does not depend on the noise level is computed once per expert, before its scan.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from lingbot_jax.config import require
from lingbot_jax.diffusion import guidance, solvers
from lingbot_jax.diffusion.flow import TIMESTEPS
from lingbot_jax.diffusion.guidance import Guidance
from lingbot_jax.models.codec import Codec, to_float
from lingbot_jax.models.condition import image_condition
from lingbot_jax.models.dit import Condition, WorldDiT
from lingbot_jax.models.experts import NoiseExperts
from lingbot_jax.models.text import TextEncoder

Latents = Float[Array, "b t h w c"]


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How a clip is sampled. Defaults are the published base model's.

    Attributes:
      steps: denoising steps. shift: of the schedule; 3 is the advice for 480p with few steps.
      solver: see `diffusion.solvers`. guidance: scale per expert, and how it is computed.
      negative_prompt: the text of the unconditional branch; used only where a scale is not 1.
    """

    steps: int = 70
    shift: float = 10.0
    solver: solvers.SolverName = "unipc"
    guidance: Guidance = Guidance()
    negative_prompt: str = ""

    def __post_init__(self):
        require(self.steps >= 1, "sample.steps", self.steps, "must be at least 1")
        require(self.shift > 0, "sample.shift", self.shift, "must be positive")


@functools.partial(jax.jit, static_argnames=("latent_frames",))
def given_frames(
    codec: Codec, frames: Float[Array, "b k H W 3"], latent_frames: int
) -> tuple[Float[Array, "b t h w s"], Latents]:
    """Mask and conditioning latent of k given video frames (`models.condition`).

    Args:
      frames: in [-1, 1]; k = 1 (image-to-video), or any 4n+1 up to the length of the clip (continuation).
      latent_frames: t of the clip.
    """
    stride = codec.config.stride[0]
    batch, k = frames.shape[:2]
    total = stride * (latent_frames - 1) + 1
    require(
        k % stride == 1 % stride and k <= total,
        "given frames",
        k,
        f"must be {stride}n + 1 and at most the {total} frames of the clip",
    )
    clip = jnp.pad(frames, ((0, 0), (0, total - k), (0, 0), (0, 0), (0, 0)))
    return image_condition(codec, clip, jnp.full(batch, codec.config.latent_frames(k)))


def draw_noise(seed: int | Int[Array, ""], indices: Int[Array, "b"], shape: tuple[int, ...]) -> Latents:
    """Start noise, one key per sample: sample i is the same in every batch it is part of."""
    key = jax.random.key(seed)
    draw = lambda i: jax.random.normal(jax.random.fold_in(key, i), shape)
    return jax.vmap(draw)(indices)


def denoise(
    model: WorldDiT | NoiseExperts,
    noise: Latents,
    condition: Condition,
    unconditional: Condition | None,
    config: SampleConfig,
    on_step: Callable[[], None] | None = None,
) -> Latents:
    """Integrates the flow from noise to clean latents. Pure; trace it inside one jit.

    Args:
      condition: what to generate. unconditional: the same with the negative text; None exactly when no
        scale differs from 1. on_step: called on the host at every step, e.g. by a progress bar.
    """
    require(
        (unconditional is not None) == config.guidance.guided,
        "guidance",
        config.guidance,
        "an unconditional branch is needed exactly when a scale is not 1",
    )
    table = solvers.make(config.solver, config.steps, config.shift)
    parts = [(model, table, config.guidance.low)]
    if isinstance(model, NoiseExperts):
        switch = int(np.sum(table.timestep >= model.boundary * TIMESTEPS))  # timesteps fall
        parts = [
            (model.high, table.rows(0, switch), config.guidance.high),
            (model.low, table.rows(switch, config.steps), config.guidance.low),
        ]
    state = solvers.start(noise)
    for expert, rows, scale in parts:
        if not len(rows.sigma):
            continue
        if scale == 1.0:
            conditions = (condition,)
        elif config.guidance.batched:
            conditions = (guidance.double(condition, unconditional),)
        else:
            conditions = (condition, unconditional)
        prepared = tuple(expert.precompute(c) for c in conditions)

        def velocity(x, timestep, expert=expert, prepared=prepared, scale=scale):
            if on_step is not None:
                jax.debug.callback(on_step)

            def predict(latents, p):
                return expert(latents, jnp.full(latents.shape[:2], timestep), p)

            return guidance.guide(predict, prepared, scale)(x)

        state = solvers.run(rows, state, velocity)
    return state.x


@functools.partial(jax.jit, static_argnames=("config", "on_step"))
def _clip(
    model: WorldDiT | NoiseExperts,
    codec: Codec,
    noise: Latents,
    condition: Condition,
    unconditional: Condition | None,
    config: SampleConfig,
    on_step: Callable[[], None] | None = None,
) -> Float[Array, "b f H W 3"]:
    return codec.decode(denoise(model, noise, condition, unconditional, config, on_step))


def sample_clips(
    model: WorldDiT | NoiseExperts,
    codec: Codec,
    text_encoder: TextEncoder,
    condition: Condition,
    config: SampleConfig,
    *,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    on_step: Callable[[], None] | None = None,
) -> Float[Array, "b f H W 3"]:
    """Samples one clip per row of a condition; all steps and the decoder are one compiled program.

    Args:
      condition: with an image (`given_frames`), whose size is the size of the clip.
      seed, indices: sample i draws its noise from (seed, indices[i]); default 0, 1, 2...
      on_step: called on the host at every step; another one is another program.

    Returns:
      Video in [-1, 1], on the device. Repeated calls of the same sizes run the same compiled program.
    """
    batch = condition.text.shape[0]
    unconditional = None
    if config.guidance.guided:
        text = text_encoder.encode([config.negative_prompt] * batch)
        unconditional = dataclasses.replace(condition, text=jnp.asarray(text))
    noise = draw_noise(
        seed, jnp.asarray(range(batch) if indices is None else indices), condition.image.shape[1:]
    )
    return _clip(model, codec, noise, condition, unconditional, config, on_step)


def generate(
    model: WorldDiT | NoiseExperts,
    codec: Codec,
    text_encoder: TextEncoder,
    frames: Shaped[Array, "b k H W 3"] | np.ndarray,
    control: Float[Array, "b t h w p"] | np.ndarray | None,
    prompts: Sequence[str],
    config: SampleConfig,
    *,
    latent_frames: int,
    seed: int = 0,
    indices: Sequence[int] | None = None,
) -> Float[Array, "b f H W 3"]:
    """Generates one clip per prompt from given frames, control and text; see `sample_clips`.

    Args:
      frames: given video frames, uint8 or float in [-1, 1]: one image, or the k frames to continue.
      control: packed control of every latent frame (`control.plucker.control`); None for models without.
      latent_frames: t; the video has stride * (t - 1) + 1 frames.
    """
    stride = codec.config.stride
    batch, _, height, width, _ = frames.shape
    require(
        height % stride[1] == 0 and width % stride[2] == 0,
        "frames",
        f"{height}x{width}",
        f"height and width must be multiples of the codec's strides {stride[1:]}",
    )
    require(len(prompts) == batch, "prompts", len(prompts), f"must be one per sample, {batch}")
    if control is not None:
        require(control.shape[1] == latent_frames, "control", control.shape, f"needs t = {latent_frames}")
        control = jnp.asarray(control)
    mask, image = given_frames(codec, to_float(frames), latent_frames)
    text = jnp.asarray(text_encoder.encode(list(prompts)))
    condition = Condition(text=text, control=control, mask=mask, image=image)
    return sample_clips(model, codec, text_encoder, condition, config, seed=seed, indices=indices)
