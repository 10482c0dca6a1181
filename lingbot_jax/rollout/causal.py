"""Causal generation in chunks of latent frames with few steps and a KV cache (paper section 3.4).

A chunk (all denoising steps, then a cache-update pass whose keys and values go into the cache) is one compiled
program with the cache donated. What does not depend on the noise level is computed once, before its steps: text
keys and values, control scale and shift, the conditioning half of the patch embedding, rotation of cached keys.
One compilation serves any length of play.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lingbot_jax.config import require
from lingbot_jax.diffusion.flow import add_noise, x0_from_velocity
from lingbot_jax.models.attention import KV, Attend
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.dit import Condition, WorldDiT
from lingbot_jax.rollout.cache import CacheLayout, KVCache
from lingbot_jax.worlds.config import CausalConfig

Latents = Float[Array, "b t h w c"]


def cache_layout(
    config: CausalConfig, network: DiTConfig, height: int, width: int, frames: int | None = None
) -> CacheLayout:
    """The cache that a chunk needs.

    Args:
      height, width: latent pixels. frames: latent frames of the longest clip; needed if there is no window.
    """
    rows, columns = height // network.patch[1], width // network.patch[2]
    if config.window is not None:
        return CacheLayout(
            config.sink, config.window - config.sink - config.chunk, rows, columns, config.positions
        )
    require(frames is not None, "causal.window", None, "play without a window needs a length")
    return CacheLayout(frames, 0, rows, columns, config.positions)


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


def denoise_chunk(
    model: WorldDiT,
    cache: KVCache,
    condition: Condition,
    noise: Float[Array, "s b t h w c"],
    config: CausalConfig,
    attend: Attend = Attend(),  # noqa: B008 - frozen
) -> tuple[Latents, KV]:
    """All steps of the next chunk, then its cache-update pass: clean latents, and their keys and values."""
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
    """Generates the next chunk and appends it to the cache: the one function of play, evaluation and distillation."""
    latents, kv = denoise_chunk(model, cache, condition, noise, config, attend)
    return latents, cache.write(kv, model.config)
