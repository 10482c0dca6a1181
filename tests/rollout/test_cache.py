"""The cache's book-keeping against a list of frames, for layouts and write sizes that do not fit each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.models import rope
from lingbot_jax.models.attention import KV
from lingbot_jax.rollout import masks
from lingbot_jax.rollout.cache import CacheLayout, KVCache
from tests.rollout.worlds import PLAIN

LAYERS, HEADS, DIM, TOKENS = PLAIN.layers, PLAIN.heads, PLAIN.head_dim, 2


def kv(first: int, t: int) -> KV:
    """Keys and values that tell the frame and the token."""
    frame = np.repeat(np.arange(first, first + t), TOKENS) + np.tile([0.0, 0.5], t)
    keys = np.broadcast_to(frame[None, None, :, None, None], (LAYERS, 1, t * TOKENS, HEADS, DIM))
    return KV(jnp.asarray(keys, jnp.float32), jnp.asarray(-keys, jnp.float32))


@jax.jit
def view(cache: KVCache) -> dict[str, jax.Array]:
    """What a chunk reads of a cache, and the keys it should read: those of `kv`, rotated by position."""
    context, layout = cache.context(PLAIN), cache.layout
    shape = (LAYERS, 1, layout.slots, TOKENS, HEADS, DIM)
    table = rope.rotary(cache.slot_positions(), 1, TOKENS, DIM, PLAIN.rope_theta)
    return {
        "frames": cache.frames,
        "places": cache.slot_positions(),
        "next": cache.positions(1)[0],
        "visible": context.visible().sum(),
        "values": context.values.reshape(shape)[0, 0, :, :, 0, 0],
        "keys": context.keys.reshape(shape),
        "expected": rope.rotate(-context.values.reshape(shape), table),
    }


LAYOUTS = [  # sink, ring, frames a write, positions
    (0, 4, 3, "absolute"),
    (2, 3, 1, "absolute"),
    (2, 3, 3, "relative"),
    (1, 1, 3, "relative"),
    (3, 0, 1, "relative"),
    (0, 1, 3, "absolute"),
]


@pytest.mark.parametrize(("sink", "ring", "t", "positions"), LAYOUTS)
def test_slots_frames_and_positions(sink, ring, t, positions):
    layout = CacheLayout(sink, ring, 1, TOKENS, positions)
    cache = KVCache.empty(PLAIN, layout, 1)
    write = jax.jit(lambda cache, kv: cache.write(kv, PLAIN), donate_argnums=0)
    for first in range(0, 5 * t, t):
        kept = [f for f in range(first) if f < sink or f >= first - ring]
        expected = {f: f for f in kept}
        if positions == "relative":  # sink first, then the ring by age
            expected = {f: i for i, f in enumerate(kept)}
        seen = jax.tree.map(np.asarray, view(cache))
        n = min(first, layout.slots)  # valid slots are a prefix, as `context` says
        held = seen["frames"].tolist()
        assert sorted(held[:n]) == kept and set(held[n:]) <= {-1}
        assert dict(zip(held[:n], seen["places"].tolist(), strict=False)) == expected
        assert seen["next"] == (first if positions == "absolute" else n)
        assert seen["visible"] == n * TOKENS
        # Values tell their frame; keys are the frame's, rotated by its position.
        told = np.array([[-f, -f - 0.5] for f in held[:n]]).reshape(n, TOKENS)
        np.testing.assert_allclose(seen["values"][:n], told)
        np.testing.assert_allclose(seen["keys"][:, :, :n], seen["expected"][:, :, :n], atol=1e-4)
        cache = write(cache, kv(first, t))
    assert write._cache_size() == 1


def test_training_masks_are_what_the_caches_hold():
    """Visible frames of each chunk's mask row = slots of the cache before it, and itself."""
    frames, chunk, window, sink = 13, 3, 8, 2
    dense = masks.chunks(frames, chunk, 1, window=window, sink=sink).dense()
    for first in range(0, frames, chunk):
        kept = [f for f in range(first) if f < sink or f >= first - (window - sink - chunk)]
        visible = np.flatnonzero(dense[first]).tolist()
        assert visible == kept + list(range(first, min(first + chunk, frames)))
