"""Which tiles a kernel visits, in which order: one int32 a grid step, prefetched into scalar memory.

Only visible tiles are steps, so a hidden tile is neither loaded nor computed. A step packs the query block
(13 bits), the key block (14 bits) and four flags. Where a context comes before the own keys, key blocks count
through both: first those of the context, then those of the own keys ("joined" coordinates).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kernels_pallas.context import Context
from kernels_pallas.mask import FULL, SKIP, Mask, Rows, union

# CLEAR: all of the tile is visible; MASKED: some of it; neither: the step computes nothing.
FIRST, LAST, CLEAR, MASKED = 1, 2, 4, 8
_KEY_SHIFT, _QUERY_SHIFT = 4, 18
_MAX_KEY_BLOCKS, _MAX_QUERY_BLOCKS = 1 << 14, 1 << 13


def query_block(step):
    return step >> _QUERY_SHIFT


def key_block(step):
    return (step >> _KEY_SHIFT) & (_MAX_KEY_BLOCKS - 1)


def valid_intervals(
    batch: int, own_start: int, own: int, context: Context | None, key_lengths: Int[Array, "b"] | None
) -> Int[Array, "b 4 2"]:
    """Intervals of keys that exist: the context's valid slots, then the own keys from own_start on."""
    lengths = jnp.full(batch, own) if key_lengths is None else jnp.clip(key_lengths, 0, own)
    keys = jnp.stack([jnp.full(batch, own_start), own_start + lengths], axis=-1)[:, None]
    slots = jnp.zeros((3, 2), jnp.int32) if context is None else jnp.clip(context.valid, 0, context.slots)
    return jnp.concatenate([jnp.broadcast_to(slots, (batch, 3, 2)), keys], axis=1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps of one kernel call. Static but for `dynamic`.

    Attributes:
      mask: of the own keys. block_q, block_k: the tile. by: the axis whose blocks are visited one after the
        other (queries in a forward kernel, keys in a backward one).
      slots: context slots before the own keys.
      limited: whether validity is known at run time only (a context, or key lengths).
    """

    mask: Mask
    block_q: int
    block_k: int
    by: Literal["queries", "keys"] = "queries"
    slots: int = 0
    limited: bool = False

    @property
    def context_blocks(self) -> int:
        return -(-self.slots // self.block_k)

    @property
    def own_start(self) -> int:
        """The first own key in joined coordinates."""
        return self.context_blocks * self.block_k

    def kinds(self) -> np.ndarray:
        """Int [query blocks, key blocks] of CLEAR, MASKED, 0, if all slots and keys are valid."""
        tiles = self.mask.tiles(self.block_q, self.block_k)
        own = np.where(tiles == FULL, CLEAR, np.where(tiles == SKIP, 0, MASKED))
        context = np.full((len(own), self.context_blocks), CLEAR)
        if self.slots % self.block_k:
            context[:, -1] = MASKED
        return np.concatenate([context, own], axis=1)

    def static(self) -> np.ndarray:
        """Int32 [steps], as if all slots and keys were valid."""
        kinds = self.kinds()
        if kinds.shape[0] > _MAX_QUERY_BLOCKS or kinds.shape[1] > _MAX_KEY_BLOCKS:
            raise ValueError(
                f"attention: {kinds.shape[0]} x {kinds.shape[1]} tiles of {self.block_q} x {self.block_k};"
                f" at most {_MAX_QUERY_BLOCKS} x {_MAX_KEY_BLOCKS}: shard the sequence"
            )
        steps = []
        for i, row in enumerate(kinds if self.by == "queries" else kinds.T):
            seen = np.flatnonzero(row) if row.any() else np.zeros(1, int)  # an empty row still writes zeros
            q, k = (i, seen) if self.by == "queries" else (seen, i)
            step = (q << _QUERY_SHIFT) | (k << _KEY_SHIFT) | row[seen]
            step[0] |= FIRST
            step[-1] |= LAST
            steps.append(step)
        return np.concatenate(steps).astype(np.int32)

    @property
    def any_masked(self) -> bool:
        return self.limited or bool((self.static() & MASKED).any())

    @property
    def intervals(self) -> int:
        """Key intervals a query needs compared: none where the mask itself hides no key."""
        return 0 if self.mask.is_full else max(len(keys) for _, _, keys in self._joined())

    @property
    def from_zero(self) -> bool:
        """Whether every first interval starts at key 0, so that one comparison does for it."""
        return all(not keys or keys[0][0] == 0 for _, _, keys in self._joined())

    def _joined(self) -> tuple[Rows, ...]:
        """The mask's rows in joined coordinates, the context among their intervals."""
        at = self.own_start
        return tuple(
            r._replace(keys=union(((0, at), *((a + at, b + at) for a, b in r.keys)))) for r in self.mask.rows
        )

    def bounds(self) -> np.ndarray:
        """Int32 [8 n]: start and stop of up to four key intervals a query, joined coordinates."""
        out = np.zeros((self.mask.n, 4, 2), np.int32)
        for start, stop, keys in self._joined():
            out[start:stop, : len(keys)] = np.array(keys).reshape(-1, 2)
        return np.ascontiguousarray(out.reshape(self.mask.n, 8).T)

    def valid(
        self, batch: int, context: Context | None, key_lengths: Int[Array, "b"] | None
    ) -> Int[Array, "b 4 2"]:
        """Intervals of keys that exist, per sample, in joined coordinates."""
        return valid_intervals(batch, self.own_start, self.mask.m, context, key_lengths)

    def dynamic(self, valid: Int[Array, "b 4 2"]) -> Int[Array, "b steps"]:
        """The steps with what is not valid taken out.

        A tile without a valid key computes nothing and names the block loaded before it, so that nothing is
        loaded either; a tile with some becomes MASKED.
        """
        steps = jnp.asarray(self.static())
        start = (key_block(steps) * self.block_k)[:, None]
        overlap = jnp.minimum(start + self.block_k, valid[:, None, :, 1]) - jnp.maximum(
            start, valid[:, None, :, 0]
        )
        keys = jnp.maximum(overlap, 0).sum(-1)
        kind = jnp.where(keys == 0, 0, jnp.where(keys < self.block_k, MASKED, steps & (CLEAR | MASKED)))
        kind = jnp.where(steps & (CLEAR | MASKED), kind, 0)
        live = jax.lax.cummax(jnp.where(kind > 0, jnp.arange(len(steps)), 0), axis=1)
        q, k = (jnp.broadcast_to(f(steps), kind.shape) for f in (query_block, key_block))
        if self.by == "queries":
            k = jnp.take_along_axis(k, live, axis=1)
        else:
            q = jnp.take_along_axis(q, live, axis=1)
        return ((q << _QUERY_SHIFT) | (k << _KEY_SHIFT) | (steps & (FIRST | LAST)) | kind).astype(jnp.int32)
