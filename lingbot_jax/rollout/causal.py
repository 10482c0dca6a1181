"""Causal generation in chunks of latent frames with few steps and a KV cache (paper section 3.4).

A chunk (all denoising steps, then a cache-update pass whose keys and values go into the cache) is one compiled
program with the cache donated. What does not depend on the noise level is computed once, before its steps: text
keys and values, control scale and shift, the conditioning half of the patch embedding, rotation of cached keys.
One compilation serves any length of play. `denoise_chunk` is the one function of play, evaluation and distillation.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lingbot_jax.config import require
from lingbot_jax.diffusion.flow import add_noise, x0_from_velocity
from lingbot_jax.models.attention import KV, Attend
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.dit import Condition, Prepared, WorldDiT
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


class Chunk(NamedTuple):
    """What a chunk became.

    Attributes:
      latents: clean. noisy: what they were predicted from, at the level of the step that play ends with, or of the
        exit step. kv: of the cache-update pass.
    """

    latents: Latents
    noisy: Latents
    kv: KV


def denoise_chunk(
    model: WorldDiT,
    cache: KVCache,
    condition: Condition,
    noise: Float[Array, "s b t h w c"],
    config: CausalConfig,
    attend: Attend = Attend(),  # noqa: B008 - frozen
    exit_step: Int[Array, ""] | None = None,
) -> Chunk:
    """The steps of the next chunk, then its cache-update pass.

    In training (paper section 3.4.2) the gradient goes through the last step alone, and into nothing that came before
    it: neither the steps, nor the cache, nor what is written to it.

    Args:
      exit_step: the step whose prediction is taken for the clean chunk; None: the last one, as in play.
    """
    few = config.few_steps()
    steps, batch, t = noise.shape[:3]
    require(
        steps == len(few.sigmas), "noise", noise.shape, f"needs {len(few.sigmas)} draws on its first axis"
    )
    trained = (model, model.precompute(condition))
    fixed = jax.lax.stop_gradient(trained)
    attend = attend_cached(model, cache, attend)
    positions = cache.positions(t)

    def predict(network: tuple[WorldDiT, Prepared], x: Latents, timestep: jax.Array | float, **kwargs: bool):
        level = jnp.full((batch, t), timestep, jnp.float32)
        return network[0](x, level, network[1], attend=attend, positions=positions, **kwargs)

    timesteps, sigmas, levels = (
        jnp.asarray(a, jnp.float32) for a in (few.timesteps, few.sigmas, few.renoise)
    )

    def clean(network: tuple[WorldDiT, Prepared], x: Latents, i: jax.Array | int) -> Latents:
        return x0_from_velocity(x, predict(network, x, timesteps[i]), sigmas[i])

    def step(i: jax.Array, x: Latents) -> Latents:
        return add_noise(clean(fixed, x, i), noise[i + 1], levels[i + 1])

    last = steps - 1 if exit_step is None else exit_step
    noisy = jax.lax.fori_loop(0, last, step, noise[0])
    latents = clean(trained, noisy, last)
    _, kv = predict(fixed, jax.lax.stop_gradient(latents), config.context_noise, return_kv=True)
    return Chunk(latents, noisy, kv)


def generate_chunk(
    model: WorldDiT,
    cache: KVCache,
    condition: Condition,
    noise: Float[Array, "s b t h w c"],
    config: CausalConfig,
    attend: Attend = Attend(),  # noqa: B008 - frozen
) -> tuple[Latents, KVCache]:
    """Generates the next chunk and appends it to the cache."""
    chunk = denoise_chunk(model, cache, condition, noise, config, attend)
    return chunk.latents, cache.write(chunk.kv, model.config)
