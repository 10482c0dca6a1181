"""The key-value cache of a causal rollout: sink slots and a ring, with shapes that never change.

A slot holds one latent frame (all its tokens, all layers). Frame f lives in slot f while f < sink, and in slot
sink + (f - sink) mod ring afterwards, so valid slots are always a prefix and writing is an index, never a shift:

    sink = 2, ring = 4     frames 0..5:  [0 1 | 2 3 4 5]      frames 6, 7 come:  [0 1 | 6 7 4 5]

The cache holds what the *next* chunk sees besides itself: a window of w latent frames (as published: sink and
own chunk included) needs ring = w - sink - chunk slots. Attention does not care about the order of slots: every
key carries its position.

Positions are those of the clip ("absolute", as published: keys are stored rotated, reading is free), or those
in the window ("relative": keys are stored un-rotated and rotated when a chunk starts, once for all of its
denoising steps; the rotary angles never leave the trained range, however long the play).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.context import Context, valid_slots
from lingbot_jax.axes import Placeholder
from lingbot_jax.config import require
from lingbot_jax.models import rope
from lingbot_jax.models.attention import KV
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.parallel.sharding import constrain_cache

Positions = Literal["absolute", "relative"]


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """The static part of a cache.

    Attributes:
      sink: slots for the first frames of the clip, which stay. ring: slots for the latest frames.
      rows, columns: tokens of a latent frame. positions: see the module.
    """

    sink: int
    ring: int
    rows: int
    columns: int
    positions: Positions = "absolute"

    def __post_init__(self):
        require(self.sink >= 0, "cache.sink", self.sink, "must not be negative")
        require(self.ring >= 0, "cache.ring", self.ring, "must not be negative")

    @property
    def slots(self) -> int:
        return self.sink + self.ring

    @property
    def tokens(self) -> int:
        """Tokens of a latent frame."""
        return self.rows * self.columns

    def slot(self, frame: Int[Array, "*n"]) -> Int[Array, "*n"]:
        """The slot of a frame; without a ring, frames past the sink have none (the result is >= slots)."""
        return jnp.where(frame < self.sink, frame, self.sink + (frame - self.sink) % max(self.ring, 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of past latent frames, for all layers.

    Attributes:
      keys, values: `[layers b slots p h k]`; keys normed, and rotated if the positions are absolute.
      frames: int32 [slots], the frame in each slot, -1 if none. count: int32, frames written so far.
      layout: static.
    """

    keys: Float[Array, "layers b slots p h k"] | Placeholder
    values: Float[Array, "layers b slots p h k"] | Placeholder
    frames: Int[Array, "slots"] | Placeholder
    count: Int[Array, ""] | Placeholder
    layout: CacheLayout = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, config: DiTConfig, layout: CacheLayout, batch: int) -> "KVCache":
        """A cache without frames, in the model's compute dtype.

        On a mesh (`jax.set_mesh`) its heads are split over seq and its batch over data x fsdp, for good: every write
        puts them there again, so that a program which takes a cache and returns one is compiled once.
        """
        shape = (config.layers, batch, layout.slots, layout.tokens, config.heads, config.head_dim)
        # Two arrays, not one twice: both are donated.
        return cls(
            constrain_cache(jnp.zeros(shape, config.dtype)),
            constrain_cache(jnp.zeros(shape, config.dtype)),
            jnp.full(layout.slots, -1, jnp.int32),
            jnp.int32(0),
            layout,
        )

    def positions(self, t: int) -> Int[Array, "t"]:
        """Rotary positions of the next t frames."""
        first = self.count
        if self.layout.positions == "relative":
            first = jnp.minimum(first, self.layout.slots)
        return first + jnp.arange(t, dtype=jnp.int32)

    def slot_positions(self) -> Int[Array, "slots"]:
        """Rotary position of the frame in each slot; 0 where there is none."""
        position = self.frames
        if self.layout.positions == "relative":
            # Frames that left the window pull the ring towards the sink: its oldest frame is at `sink`.
            gone = jnp.maximum(self.count - self.layout.slots, 0)
            position = jnp.where(position < self.layout.sink, position, position - gone)
        return jnp.maximum(position, 0)

    def context(self, config: DiTConfig, valid: Int[Array, "3 2"] | None = None) -> Context:
        """What attention sees of the cache. With relative positions this rotates all keys: call it once a
        chunk, outside the loop over denoising steps.

        Args:
          valid: intervals of slots to see instead of all that hold a frame.
        """
        keys = self.keys
        if self.layout.positions == "relative":
            keys = rope.rotate(keys, self._table(self.slot_positions(), config))
        if valid is None:
            valid = valid_slots((0, jnp.minimum(self.count, self.layout.slots)))
        flat = lambda x: x.reshape(*x.shape[:2], -1, *x.shape[4:])
        return Context(flat(keys), flat(self.values), valid * self.layout.tokens)

    def write(self, kv: KV, config: DiTConfig) -> "KVCache":
        """Appends frames: `kv` of a forward pass over the next frames, keys normed and not rotated.

        Frames that fit nowhere (no ring, sink full) are counted and not stored.
        """
        t = kv.keys.shape[2] // self.layout.tokens
        stored = self.store(kv, self.count + jnp.arange(t, dtype=jnp.int32), config)
        return dataclasses.replace(stored, count=self.count + t)

    def store(
        self, kv: KV, frames: Int[Array, "t"], config: DiTConfig, limit: Int[Array, ""] | None = None
    ) -> "KVCache":
        """Puts given frames into their slots, those below `limit` if there is one; `count` stays."""
        layout, t = self.layout, len(frames)
        keys, values = (
            x.reshape(*x.shape[:2], t, layout.tokens, *x.shape[3:]).astype(self.keys.dtype)
            for x in (kv.keys, kv.values)
        )
        if layout.positions == "absolute":
            keys = rope.rotate(keys, self._table(frames, config))
        keys, values = constrain_cache(keys), constrain_cache(values)
        if layout.ring == 0:  # there is no slot past the sink
            limit = jnp.int32(layout.sink) if limit is None else jnp.minimum(limit, layout.sink)
        held = (self.keys, self.values, self.frames)
        for i in range(
            t if layout.slots else 0
        ):  # in order, so that of two frames for a slot the later stays
            at = jnp.minimum(layout.slot(frames[i]), layout.slots - 1)
            new = (keys[:, :, i], values[:, :, i], frames[i])
            if limit is not None:
                old = (held[0][:, :, at], held[1][:, :, at], held[2][at])
                new = jax.tree.map(lambda n, o, i=i: jnp.where(frames[i] < limit, n, o), new, old)
            held = (
                jax.lax.dynamic_update_index_in_dim(held[0], new[0], at, 2),
                jax.lax.dynamic_update_index_in_dim(held[1], new[1], at, 2),
                jax.lax.dynamic_update_index_in_dim(held[2], new[2], at, 0),
            )
        keys, values = constrain_cache(held[0]), constrain_cache(held[1])
        return dataclasses.replace(self, keys=keys, values=values, frames=held[2])

    def _table(self, positions: Int[Array, "t"], config: DiTConfig) -> rope.Rotary:
        return rope.rotary(
            positions, self.layout.rows, self.layout.columns, config.head_dim, config.rope_theta
        )
