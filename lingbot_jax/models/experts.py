"""Two experts by noise level (paper section 3.2.1): one for high noise, one for low, behind one call.

`NoiseExperts` is called like a `WorldDiT`; a world with one expert (the fast model, the tiny one) simply is a
`WorldDiT`, and everything that takes a world takes either. Training picks one expert's parameters with
`select` and puts them back with `replace`; a sampler that knows its steps beforehand may call `high` and `low`
directly on their parts of the schedule.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from lingbot_jax.config import require
from lingbot_jax.models.attention import KV, Attend
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.dit import Condition, Prepared, WorldDiT

BOUNDARY = 0.947  # of the published model, as a noise fraction

Expert = Literal["high", "low"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertsPrepared:
    """A condition prepared for both experts: they have different text keys and different adapters."""

    high: Prepared
    low: Prepared


class NoiseExperts(nnx.Module):
    """A high-noise and a low-noise WorldDiT of the same config.

    Attributes:
      high, low: the experts. boundary: noise fraction from which on the high-noise expert is used.
    """

    def __init__(self, config: DiTConfig, key: jax.Array, boundary: float = BOUNDARY):
        require(0 < boundary < 1, "boundary", boundary, "must be a noise fraction between 0 and 1")
        high, low = jax.random.split(key)
        self.high = WorldDiT(config, high)
        self.low = WorldDiT(config, low)
        self.boundary = boundary

    @property
    def config(self) -> DiTConfig:
        return self.high.config

    def is_high(self, timestep: Float[Array, "b *t"]) -> Bool[Array, ""]:
        """Whether the batch belongs to the high-noise expert: its noisiest frame is at or above the boundary.

        A batch carries one region; given frames at t = 0 do not count.
        """
        return jnp.max(timestep) >= self.boundary * 1000

    def select(self, expert: Expert) -> WorldDiT:
        """The named expert, e.g. to train it alone."""
        return {"high": self.high, "low": self.low}[expert]

    def replace(self, expert: Expert, model: WorldDiT) -> "NoiseExperts":
        """New experts with the named one exchanged; self stays as it was."""
        made = nnx.merge(*nnx.split(self))
        setattr(made, expert, model)
        return made

    def precompute(self, condition: Condition) -> ExpertsPrepared:
        """Everything that does not depend on the noise level, for both experts."""
        return ExpertsPrepared(self.high.precompute(condition), self.low.precompute(condition))

    def __call__(
        self,
        latents: Float[Array, "b t h w c"],
        timestep: Float[Array, "b t"] | Float[Array, "b t p"],
        condition: Condition | ExpertsPrepared,
        *,
        attend: Attend = Attend(),  # noqa: B008 - frozen
        positions: Int[Array, "t"] | None = None,
        return_kv: bool = False,
    ) -> Float32[Array, "b t h w c"] | tuple[Float32[Array, "b t h w c"], KV]:
        """See `WorldDiT`. Only the chosen expert is computed; the choice is made on the device."""

        def run(expert: Expert):
            prepared = getattr(condition, expert) if isinstance(condition, ExpertsPrepared) else condition
            return self.select(expert)(
                latents, timestep, prepared, attend=attend, positions=positions, return_kv=return_kv
            )

        return jax.lax.cond(self.is_high(timestep), lambda: run("high"), lambda: run("low"))
