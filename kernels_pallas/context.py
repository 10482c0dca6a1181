"""Keys and values that were written before: what a chunk's queries see besides their own keys."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MAX_VALID = 3  # intervals of valid slots: the sink and a ring that wraps around need three


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """A cache's content as attention sees it: slots, and which of them hold something.

    The order of slots means nothing to attention (keys are already rotated), so a ring is never shifted.

    Attributes:
      keys, values: `[b m h k]`, or `[layers b m h k]` for all layers at once; rotated, normed.
      valid: int32 `[3 2]`, half-open intervals of valid slots, disjoint; empty ones have start = stop. Dynamic:
        a change of it compiles nothing.
    """

    keys: Float[Array, "*layers b m h k"]
    values: Float[Array, "*layers b m h k"]
    valid: Int[Array, "3 2"]

    @property
    def slots(self) -> int:
        return self.keys.shape[-3]

    def layer(self, keys: Array, values: Array) -> "Context":
        """The same slots with one layer's keys and values, as a scan over layers hands them out."""
        return Context(keys, values, self.valid)

    def visible(self) -> Bool[Array, "m"]:
        """True where a slot is valid."""
        slot = jnp.arange(self.slots)[:, None]
        return jnp.any((slot >= self.valid[:, 0]) & (slot < self.valid[:, 1]), axis=-1)


def valid_slots(*intervals: tuple[int | Array, int | Array]) -> Int[Array, "3 2"]:
    """Packs up to three (start, stop) pairs, Python ints or traced scalars, into `Context.valid`."""
    if len(intervals) > MAX_VALID:
        raise ValueError(f"Context.valid: {len(intervals)} intervals; at most {MAX_VALID}")
    pairs = [jnp.stack([jnp.asarray(a, jnp.int32), jnp.asarray(b, jnp.int32)]) for a, b in intervals]
    return jnp.stack(pairs + [jnp.zeros(2, jnp.int32)] * (MAX_VALID - len(intervals)))
