"""A chunk's queries against a cache: its valid slots, and the chunk's own keys, which need not be written first.

The kernel is `flash_forward` with a context. Slots are read where they lie: the intervals of the valid ones (a sink,
and a ring that may wrap around) are prefetched, tiles without a valid slot are neither loaded nor computed, and the
order of slots means nothing because keys carry their rotation.

Window-relative positions for a cache of unrotated keys: rotate the keys before the call, or write them rotated, not
here. Inside, every block of queries would rotate every key again; docs/kernels.md has the cycles.
"""

from jaxtyping import Array, Float

from kernels_pallas.context import Context
from kernels_pallas.flash_attention import flash_attention
from kernels_pallas.tiles import Generation, Tiles


def cached_attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b n h k"],
    v: Float[Array, "b n h k"],
    context: Context,
    *,
    generation: Generation,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "b n h k"]:
    """Attention of one chunk to the context and to all of itself; arguments as in `flash_attention`.

    Differentiable in q, k and v; the context gets no gradient.
    """
    return flash_attention(
        q, k, v, None, generation=generation, context=context, tiles=tiles, interpret=interpret
    )
