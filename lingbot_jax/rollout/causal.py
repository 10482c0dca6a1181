"""Causal generation in chunks of latent frames with few steps and a KV cache (paper section 3.4).

A chunk (all denoising steps, then a cache-update pass whose keys and values go into the cache) is one compiled
program with the cache donated. What does not depend on the noise level is computed once, before its steps: text
keys and values, control scale and shift, the conditioning half of the patch embedding, rotation of cached keys.
One compilation serves any length of play.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lingbot_jax.config import require
from lingbot_jax.diffusion import guidance, solvers
from lingbot_jax.diffusion.flow import add_noise, x0_from_velocity
from lingbot_jax.diffusion.schedule import FewSteps
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
    """All steps of the next chunk, then its cache-update pass: clean latents, and their keys and values.

    With guidance, condition and cache have the conditional samples, then as many unconditional ones.
    """
    t = noise.shape[2]
    have, need = noise.shape[0], config.draws
    require(have == need, "noise", noise.shape, f"needs {need} draws on its first axis")
    prepared = model.precompute(condition)
    attend = attend_cached(model, cache, attend)
    positions = cache.positions(t)
    branches = 2 if config.guided else 1

    def run(x: Latents, timestep, **kwargs):
        both = jnp.concatenate([x] * branches)
        level = jnp.full((len(both), t), timestep, jnp.float32)
        return model(both, level, prepared, attend=attend, positions=positions, **kwargs)

    def predict(x: Latents, timestep) -> Latents:
        if not config.guided:
            return run(x, timestep)
        cond, uncond = jnp.split(run(x, timestep), 2)
        return guidance.combine(cond, uncond, config.sample.guidance.low)

    if config.sample is None:
        x0 = _few_steps(predict, noise, config.few_steps())
    else:
        table = solvers.make(config.sample.solver, config.sample.steps, config.sample.shift)
        x0 = solvers.run(table, solvers.start(noise[0]), predict).x
    _, kv = run(x0, config.context_noise, return_kv=True)
    return x0, kv


def _few_steps(
    predict: Callable[[Latents, Float[Array, ""]], Latents], noise: Float[Array, "s b t h w c"], few: FewSteps
) -> Latents:
    """Predict x0, re-noise it to the next level, and so on."""

    def step(x: Latents, row) -> tuple[Latents, None]:
        timestep, sigma, next_sigma, next_noise = row
        x0 = x0_from_velocity(x, predict(x, timestep), sigma)
        return add_noise(x0, next_noise, next_sigma), None

    # The last step re-noises to level 0: its draw has weight zero.
    f32 = functools.partial(jnp.asarray, dtype=jnp.float32)
    next_sigmas = jnp.append(f32(few.renoise[1:]), 0.0)
    rows = (f32(few.timesteps), f32(few.sigmas), next_sigmas, jnp.roll(noise, -1, axis=0))
    return jax.lax.scan(step, noise[0], rows)[0]


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
