"""Causal generation in chunks of latent frames with few steps and a KV cache (paper section 3.4).

A chunk (all denoising steps, then a clean pass whose keys and values go into the cache) is one compiled
program with the cache donated. What does not depend on the noise level is computed once, before its steps: text
keys and values, control scale and shift, the conditioning half of the patch embedding, rotation of cached keys.
The same function serves sessions (one call a chunk, one compilation for any length), whole rollouts
(`lax.scan` over chunks) and distillation.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lingbot_jax.config import require
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.diffusion import schedule as schedules
from lingbot_jax.diffusion.flow import add_noise, x0_from_velocity
from lingbot_jax.models.attention import KV, Attend
from lingbot_jax.models.dit import Condition, Prepared, WorldDiT
from lingbot_jax.rollout.cache import CacheLayout, KVCache, Positions

Latents = Float[Array, "b t h w c"]


@dataclasses.dataclass(frozen=True)
class CausalConfig:
    """How a causal model generates. Defaults are the published fast model's, with its successor's window.

    Attributes:
      chunk: latent frames generated at once.
      window: latent frames a chunk sees, itself and the sink included; None: all of the clip.
      sink: first latent frames of the clip that every chunk sees; part of the window.
      positions: of the clip or in the window (see `cache`); unbounded play needs "relative".
      schedule: "fast": `levels` are indices into the 1000-step schedule (the published fast model);
        "warped": `levels` are counts of 1000, warped by the shift (Self-Forcing).
      shift: of the schedule. context_noise: timestep of the clean pass.
    """

    chunk: int = 3
    window: int | None = 18
    sink: int = 6
    positions: Positions = "relative"
    schedule: Literal["fast", "warped"] = "fast"
    levels: tuple[int, ...] = (0, 179, 358, 679)
    shift: float = 5.0
    context_noise: float = 0.0

    def __post_init__(self):
        require(self.chunk >= 1, "causal.chunk", self.chunk, "must be at least 1 latent frame")
        require(self.sink >= 0, "causal.sink", self.sink, "must not be negative")
        require(bool(self.levels), "causal.levels", self.levels, "must name at least one level")
        require(self.shift > 0, "causal.shift", self.shift, "must be positive")
        require(
            0 <= self.context_noise <= 1000,
            "causal.context_noise",
            self.context_noise,
            "must be in [0, 1000]",
        )
        if self.window is None:
            require(self.sink == 0, "causal.sink", self.sink, "means nothing without causal.window")
        else:
            least = self.sink + self.chunk
            require(
                self.window >= least, "causal.window", self.window, f"must hold sink + chunk = {least} frames"
            )

    def few_steps(self) -> schedules.FewSteps:
        make = {"fast": schedules.fast, "warped": schedules.warped}[self.schedule]
        return make(self.shift, self.levels)

    def layout(self, model: DiTConfig, height: int, width: int, frames: int | None = None) -> CacheLayout:
        """The cache this needs.

        Args:
          height, width: latent pixels. frames: latent frames of the longest clip; needed if window is None.
        """
        rows, columns = height // model.patch[1], width // model.patch[2]
        if self.window is not None:
            return CacheLayout(self.sink, self.window - self.sink - self.chunk, rows, columns, self.positions)
        require(frames is not None, "causal.window", None, "play without a window needs a length")
        return CacheLayout(frames, 0, rows, columns, self.positions)


def draw_noise(
    key: PRNGKeyArray, chunk: int | Array, shape: tuple[int, ...], steps: int
) -> Float[Array, "s b t h w c"]:
    """The Gaussian draws of one chunk: start latent, then one per re-noising. Depends on the chunk's number,
    not on what was drawn before: a restored session continues identically."""
    return jax.random.normal(jax.random.fold_in(key, chunk), (steps, *shape))


def attend_cached(model: WorldDiT, cache: KVCache, attend: Attend) -> Attend:
    """`attend` with the cache as context."""
    if cache.layout.slots == 0:
        return attend
    return dataclasses.replace(attend, context=cache.context(model.config))


def forward_chunk(
    model: WorldDiT,
    cache: KVCache,
    latents: Latents,
    timestep: Float[Array, "b t"],
    condition: Condition | Prepared,
    attend: Attend = Attend(),  # noqa: B008 - frozen
) -> tuple[Latents, KVCache]:
    """One pass over the next frames that also writes them: velocity, and the cache with them in it."""
    velocity, kv = model(
        latents,
        timestep,
        condition,
        attend=attend_cached(model, cache, attend),
        positions=cache.positions(latents.shape[1]),
        return_kv=True,
    )
    return velocity, cache.write(kv, model.config)


def denoise_chunk(
    model: WorldDiT,
    cache: KVCache,
    condition: Condition,
    noise: Float[Array, "s b t h w c"],
    config: CausalConfig,
    attend: Attend = Attend(),  # noqa: B008 - frozen
) -> tuple[Latents, KV]:
    """All steps of the next chunk, then its clean pass: clean latents, and their keys and values."""
    few = config.few_steps()
    steps, batch, t = noise.shape[:3]
    require(
        steps == len(few.sigmas), "noise", noise.shape, f"needs {len(few.sigmas)} draws on its first axis"
    )
    prepared = model.precompute(condition)
    attend = attend_cached(model, cache, attend)
    positions = cache.positions(t)

    def predict(x: Latents, timestep, **kwargs):
        level = jnp.full((batch, t), timestep, jnp.float32)
        return model(x, level, prepared, attend=attend, positions=positions, **kwargs)

    def step(x: Latents, row) -> tuple[Latents, None]:
        timestep, sigma, next_sigma, next_noise = row
        x0 = x0_from_velocity(x, predict(x, timestep), sigma)
        return add_noise(x0, next_noise, next_sigma), None

    # The last step re-noises to level 0: its draw has weight zero.
    f32 = functools.partial(jnp.asarray, dtype=jnp.float32)
    next_sigmas = jnp.append(f32(few.renoise[1:]), 0.0)
    rows = (f32(few.timesteps), f32(few.sigmas), next_sigmas, jnp.roll(noise, -1, axis=0))
    x0, _ = jax.lax.scan(step, noise[0], rows)
    _, kv = predict(x0, config.context_noise, return_kv=True)
    return x0, kv


def generate_chunk(
    model: WorldDiT,
    cache: KVCache,
    condition: Condition,
    noise: Float[Array, "s b t h w c"],
    config: CausalConfig,
    attend: Attend = Attend(),  # noqa: B008 - frozen
) -> tuple[Latents, KVCache]:
    """Generates the next chunk and appends it to the cache. Pure; `jit_chunk` is its compiled form."""
    latents, kv = denoise_chunk(model, cache, condition, noise, config, attend)
    return latents, cache.write(kv, model.config)


jit_chunk = jax.jit(generate_chunk, static_argnames=("config",), donate_argnames=("cache",))


def split_chunks(condition: Condition, chunk: int) -> Condition:
    """The condition of a clip as a stack over chunks, without its text, which all chunks share.

    Raises:
      ConfigError: the clip's latent frames do not divide into chunks.
    """
    cut = lambda x: None if x is None else _cut(x, chunk)
    parts = {name: cut(getattr(condition, name)) for name in ("control", "mask", "image")}
    return dataclasses.replace(condition, text=None, **parts)


def _cut(x: Float[Array, "b t ..."], chunk: int) -> Float[Array, "n b chunk ..."]:
    b, t = x.shape[:2]
    require(t % chunk == 0, "latent frames", t, f"must be a multiple of causal.chunk = {chunk}")
    return jnp.moveaxis(x.reshape(b, t // chunk, chunk, *x.shape[2:]), 1, 0)


def rollout(
    model: WorldDiT,
    cache: KVCache,
    condition: Condition,
    noise: Float[Array, "n s b t h w c"],
    config: CausalConfig,
    attend: Attend = Attend(),  # noqa: B008 - frozen
) -> tuple[Latents, KVCache]:
    """Generates n chunks in one program: clean latents `b (n t) h w c`, and the cache after them.

    Args:
      condition: of the whole clip, n * t latent frames. noise: see `draw_noise`, one row a chunk.
    """
    chunks = split_chunks(condition, config.chunk)

    def body(cache: KVCache, inputs) -> tuple[KVCache, Latents]:
        part, draws = inputs
        part = dataclasses.replace(part, text=condition.text)
        latents, cache = generate_chunk(model, cache, part, draws, config, attend)
        return cache, latents

    cache, latents = jax.lax.scan(body, cache, (chunks, noise))
    n, b, t = latents.shape[:3]
    return jnp.moveaxis(latents, 0, 1).reshape(b, n * t, *latents.shape[3:]), cache
