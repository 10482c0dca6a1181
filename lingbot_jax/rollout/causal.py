"""Causal generation in chunks of latent frames with few steps and a KV cache (paper section 3.4).

A chunk (all denoising steps, then a cache-update pass whose keys and values go into the cache) is one compiled
program with the cache donated. What does not depend on the noise level is computed once, before its steps: text
keys and values, control scale and shift, the conditioning half of the patch embedding, rotation of cached keys.
One compilation serves any length of play. `denoise_chunk` is the one function of play, evaluation and distillation.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lingbot_jax.config import require
from lingbot_jax.diffusion import guidance, solvers
from lingbot_jax.diffusion.flow import add_noise, x0_from_velocity
from lingbot_jax.diffusion.schedule import FewSteps
from lingbot_jax.models import rope
from lingbot_jax.models.attention import KV, Attend
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.dit import Condition, Prepared, WorldDiT
from lingbot_jax.rollout.cache import CacheLayout, KVCache
from lingbot_jax.worlds.config import CausalConfig

Latents = Float[Array, "b t h w c"]
Network = tuple[WorldDiT, Prepared]  # and what it is told
Number = Int[Array, ""] | int  # traced, or known when the program is compiled
Predict = Callable[[Latents, Float[Array, ""]], Latents]  # (noisy, timestep) -> velocity


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


def check_length(config: CausalConfig, frames: int) -> None:
    """Raises ConfigError if absolute positions end before that many latent frames; relative ones never do."""
    fits = config.positions == "relative" or frames <= rope.POSITIONS
    require(fits, "causal.positions", "absolute", f"must be relative beyond {rope.POSITIONS} latent frames")


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
      latents: clean. noisy: of few steps, what they were predicted from in the last step; of many, the start.
      kv: of the cache-update pass.
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
    exit_step: Number | None = None,
) -> Chunk:
    """The steps of the next chunk, then its cache-update pass.

    With guidance, condition and cache have the conditional samples, then as many unconditional ones. In training (paper
    section 3.4.2) the gradient goes through the last of few steps alone, and into nothing that came before it: neither
    the steps, nor the cache, nor what is written to it.

    Args:
      exit_step: of few steps, the one whose prediction is taken for the clean chunk; None: the last, as in play.
    """
    t = noise.shape[2]
    have, need = noise.shape[0], config.draws
    require(have == need, "noise", noise.shape, f"needs {need} draws on its first axis")
    trained = (model, model.precompute(condition))
    fixed = jax.lax.stop_gradient(trained)
    attend = attend_cached(model, cache, attend)
    positions = cache.positions(t)
    branches = 2 if config.guided else 1

    def run(network: Network, x: Latents, timestep: Array | float, **kwargs: bool):
        both = jnp.concatenate([x] * branches)
        level = jnp.full((len(both), t), timestep, jnp.float32)
        return network[0](both, level, network[1], attend=attend, positions=positions, **kwargs)

    def predict(network: Network, x: Latents, timestep: Array) -> Latents:
        if not config.guided:
            return run(network, x, timestep)
        cond, uncond = jnp.split(run(network, x, timestep), 2)
        return guidance.combine(cond, uncond, config.sample.guidance.low)

    if config.sample is None:
        few, last = config.few_steps(), exit_step
        noisy = _few_steps(functools.partial(predict, fixed), noise, few, last)
        latents = _clean(functools.partial(predict, trained), noisy, few, last)
    else:
        table, noisy = solvers.make(config.sample.solver, config.sample.steps, config.sample.shift), noise[0]
        latents = solvers.run(table, solvers.start(noisy), functools.partial(predict, trained)).x
    _, kv = run(fixed, jax.lax.stop_gradient(latents), config.context_noise, return_kv=True)
    return Chunk(latents, noisy, kv)


def _few_steps(
    predict: Predict, noise: Float[Array, "s b t h w c"], few: FewSteps, last: Number | None
) -> Latents:
    """Predict x0, re-noise it to the next level, and so on: what the last step begins with."""
    levels = jnp.asarray(few.renoise, jnp.float32)

    def step(i: Number, x: Latents) -> Latents:
        return add_noise(_clean(predict, x, few, i), noise[i + 1], levels[i + 1])

    return jax.lax.fori_loop(0, len(levels) - 1 if last is None else last, step, noise[0])


def _clean(predict: Predict, x: Latents, few: FewSteps, step: Number | None) -> Latents:
    """The clean latent that a step predicts; None: the last one."""
    timestep, sigma = (
        jnp.asarray(table, jnp.float32)[-1 if step is None else step] for table in (few.timesteps, few.sigmas)
    )
    return x0_from_velocity(x, predict(x, timestep), sigma)


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
