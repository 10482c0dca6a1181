"""Classifier-free guidance: uncond + g (cond - uncond), with one scale per expert.

Distillation's real score uses the other convention, cond + g (cond - uncond): its g is this one's g - 1.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lingbot_jax.config import require

P = TypeVar("P")
Velocity = Float[Array, "b t h w c"]


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Scales and how the two predictions are computed.

    Attributes:
      low, high: scale of the low-noise and high-noise expert, >= 1; 1 is no guidance (one pass a step).
      batched: one pass over a doubled batch (faster on small models), or two passes (half the activations).
    """

    low: float = 5.0
    high: float = 5.0
    batched: bool = False

    def __post_init__(self):
        for name in ("low", "high"):
            require(getattr(self, name) >= 1.0, f"guidance.{name}", getattr(self, name), "must be >= 1")

    @property
    def guided(self) -> bool:
        """Whether any step needs an unconditional prediction."""
        return self.low != 1.0 or self.high != 1.0


def combine(cond: Velocity, uncond: Velocity, scale: float) -> Velocity:
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
