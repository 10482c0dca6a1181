"""Kernels at their real shapes, to be compiled ahead of time for TPU devices that need not exist.

    devices = jax.experimental.topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x4").devices
    fn, args = CASES["flash_full_forward"](devices)
    jax.jit(fn).lower(*args).compile()

One head a device: kernels see one head at a time, so more heads change the grid and nothing else. Forward cases hold
both forms, fixed_max and the stale_max that takes over where the first is not safe.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas import shapes, tiles
from kernels_pallas.cached_attention import cached_attention
from kernels_pallas.context import Context
from kernels_pallas.flash_attention import flash_attention
from kernels_pallas.mask import Mask

Case = tuple[Callable[..., Any], tuple[Any, ...]]


def _case(devices: Sequence[jax.Device], local, tokens: Sequence[int], head_dim: int) -> Case:
    """`local` under shard_map with bf16 arrays `[devices, n, 1, head_dim]`, one for each of `tokens`."""
    mesh = Mesh(np.array(devices), ("d",))
    spec = PartitionSpec("d")
    args = tuple(
        jax.ShapeDtypeStruct((len(devices), n, 1, head_dim), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for n in tokens
    )
    fn = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * len(args), out_specs=spec, check_vma=False)
    return fn, args


def forward(devices: Sequence[jax.Device], mask: Mask, head_dim: int = shapes.HEAD_DIM) -> Case:
    chip = tiles.generation(devices[0])
    local = lambda q, k, v: flash_attention(q, k, v, mask, generation=chip)
    return _case(devices, local, (mask.n, mask.m, mask.m), head_dim)


def backward(devices: Sequence[jax.Device], mask: Mask, head_dim: int = shapes.HEAD_DIM) -> Case:
    """The forward pass and the gradients of q, k and v."""
    chip = tiles.generation(devices[0])
    attend = lambda q, k, v: flash_attention(q, k, v, mask, generation=chip)
    local = lambda q, k, v, g: jax.vjp(attend, q, k, v)[1](g)
    return _case(devices, local, (mask.n, mask.m, mask.m, mask.n), head_dim)


def cached(
    devices: Sequence[jax.Device],
    chunk: int = shapes.CHUNK,
    slots: int = shapes.CONTEXT,
    head_dim: int = shapes.HEAD_DIM,
    backward: bool = False,
) -> Case:
    """A chunk on a cache whose valid slots are a run-time value; `backward`: and the gradients of q, k and v."""
    chip = tiles.generation(devices[0])
    mesh = Mesh(np.array(devices), ("d",))
    split, whole = (PartitionSpec("d"), PartitionSpec())

    def local(q, k, v, keys, values, *rest):
        *g, valid = rest
        attend = lambda q, k, v: cached_attention(q, k, v, Context(keys, values, valid), generation=chip)
        return jax.vjp(attend, q, k, v)[1](*g) if backward else attend(q, k, v)

    tokens = (chunk, chunk, chunk, slots, slots, *[chunk] * backward)
    specs = (split,) * len(tokens) + (whole,)
    fn = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    _, args = _case(devices, local, tokens, head_dim)
    return fn, (*args, jax.ShapeDtypeStruct((3, 2), jnp.int32, sharding=NamedSharding(mesh, whole)))


CASES: dict[str, Callable[[Sequence[jax.Device]], Case]] = {
    "flash_full_forward": functools.partial(forward, mask=shapes.FULL),
    "flash_full_backward": functools.partial(backward, mask=shapes.FULL),
    "flash_block_causal_forward": functools.partial(forward, mask=shapes.BLOCK_CAUSAL),
    "flash_block_causal_backward": functools.partial(backward, mask=shapes.BLOCK_CAUSAL),
    "cached_forward": cached,
    "cached_backward": functools.partial(cached, backward=True),
}

# Matrix FLOPs of one pass through the hot region, which is one unmasked tile. Blocks are the same on all generations.
_CLIP = tiles.choose("v6e", shapes.TOKENS, shapes.TOKENS)
_CACHED = tiles.choose("v6e", shapes.CHUNK, shapes.CONTEXT, cached=True)
_TILES = {
    "flash_full_forward": (_CLIP.fixed_max, 4),
    "flash_full_backward": (_CLIP.backward, 10),
    "flash_block_causal_forward": (_CLIP.fixed_max, 4),
    "flash_block_causal_backward": (_CLIP.backward, 10),
    "cached_forward": (_CACHED.fixed_max, 4),
    "cached_backward": (_CACHED.backward, 6),  # a tile of the context: S, dO V^T and dQ
}
TILE_FLOPS: dict[str, int] = {
    name: products * tile.block_q * tile.block_k * shapes.HEAD_DIM
    for name, (tile, products) in _TILES.items()
}
