"""Classifier-free guidance: uncond + g (cond - uncond), with one scale per expert.

Published distillation writes its real score as cond + g (cond - uncond): its g is this one's g - 1 (`distill`).
"""

from collections.abc import Callable
from typing import Annotated, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import Field

from lingbot_jax.config import config

P = TypeVar("P")
Velocity = Float[Array, "b t h w c"]


Scale = Annotated[float, Field(ge=1, le=1000, allow_inf_nan=False)]


@config
class Guidance:
    """Scales and how the two predictions are computed."""

    low: Scale = Field(5.0, description="scale of the low-noise expert; 1 is no guidance (one pass per step)")
    high: Scale = Field(5.0, description="scale of the high-noise expert")
    batched: bool = Field(
        False, description="one pass over a doubled batch, or two passes (half the activations)"
    )

    @property
    def guided(self) -> bool:
        """Whether any step needs an unconditional prediction."""
        return self.low != 1.0 or self.high != 1.0


def combine(cond: Velocity, uncond: Velocity, scale: float | Float[Array, ""]) -> Velocity:
    return uncond + scale * (cond - uncond)


def guide(
    predict: Callable[[Velocity, P], Velocity],
    conditions: tuple[P, ...],
    scale: float,
) -> Callable[[Velocity], Velocity]:
    """The guided prediction from `predict(latents, condition)`.

    Args:
      conditions: `(cond,)`: no guidance; `(cond, uncond)`: two passes; with `(both,)` and scale != 1, `both`
        holds the conditional samples, then the unconditional ones, on a doubled batch: one pass.
    """
    if scale == 1.0:
        return lambda x: predict(x, conditions[0])
    if len(conditions) == 2:
        return lambda x: combine(predict(x, conditions[0]), predict(x, conditions[1]), scale)

    def batched(x: Velocity) -> Velocity:
        cond, uncond = jnp.split(predict(jnp.concatenate([x, x]), conditions[0]), 2)
        return combine(cond, uncond, scale)

    return batched


def double(cond: P, uncond: P) -> P:
    """One condition of twice the batch: conditional samples first."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, uncond)
