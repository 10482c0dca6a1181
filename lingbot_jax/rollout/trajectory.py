"""A teacher's trajectories from noise to clips, with the states that a student of few steps passes: what it may regress
on (most peers start their students so)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from pydantic import Field

from lingbot_jax.config import Positive, config
from lingbot_jax.diffusion import guidance, schedule
from lingbot_jax.diffusion.flow import TIMESTEPS
from lingbot_jax.diffusion.guidance import Scale
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.dit import Condition, Prepared, WorldDiT

Latents = Float[Array, "b t h w c"]


@config
class TrajectoryConfig:
    """Euler steps and guidance of a teacher's trajectories."""

    steps: Annotated[int, Field(gt=0, le=1000)] = Field(
        48, description="evenly spread before the shift; the student's levels are visited as well"
    )
    shift: Annotated[Positive, Field(le=1000)] = Field(5.0, description="of the steps")
    guidance: Scale = Field(4.0, description="classifier-free; 1: none, one pass per step")


def trajectory(
    networks: Mapping[str, WorldDiT],
    boundary: float,
    noise: Latents,
    condition: Condition,
    negative: Float[Array, "b *n l d"],
    levels: Sequence[float],
    config: TrajectoryConfig,
    attend: Attend,
) -> tuple[Float[Array, "s b t h w c"], Latents]:
    """The flow from noise by Euler steps that visit given noise levels: the latents there, and the clean ones.

    Args:
      networks, boundary: as of `denoise`. negative: text of the unconditional branch. levels: falling, in (0, 1].
    """
    even = schedule.euler(config.steps, config.shift).sigmas
    # Levels that nearly meet one of the even ones take its place.
    sigmas = np.concatenate([even[[all(abs(s - level) > 1e-6 for level in levels) for s in even]], levels])
    sigmas = np.sort(sigmas)[::-1]
    switch = int(np.sum(sigmas[:-1] >= boundary)) if len(networks) > 1 else 0
    parts = [(next(iter(networks.values())), 0, len(sigmas) - 1)]
    if len(networks) > 1:
        parts = [(networks["high"], 0, switch), (networks["low"], switch, len(sigmas) - 1)]
    x, seen = noise, []
    for network, start, stop in parts:
        prepared = (network.precompute(condition),)
        if config.guidance != 1.0:
            prepared += (dataclasses.replace(*prepared, text=network.precompute_text(negative)),)

        def step(x: Latents, level: Array, network=network, prepared=prepared) -> tuple[Latents, Latents]:
            def predict(latents: Latents, p: Prepared) -> Latents:
                return network(latents, jnp.full(latents.shape[:2], TIMESTEPS * level[0]), p, attend=attend)

            return x + (level[1] - level[0]) * guidance.guide(predict, prepared, config.guidance)(x), x

        rows = np.stack([sigmas[start:stop], sigmas[start + 1 : stop + 1]], axis=1).astype(np.float32)
        x, states = jax.lax.scan(step, x, rows)
        seen.append(states)
    at = [int(np.argmin(np.abs(sigmas - level))) for level in levels]
    return jnp.concatenate(seen)[np.array(at)], x
