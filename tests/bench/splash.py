"""`jax.experimental.pallas.ops.tpu.splash_attention` at its best: what the bench of our kernels compares with.

    python -m tests.bench.splash

prints the static cycles of every candidate of its tiles and the table BEST below. Splash has one variant of a
tile: with a mask, every tile computes it. The mask is counted as `CausalMask`, one comparison with an index a row
that is prefetched, the cheapest it has (`NumpyMask` loads a byte a pair); hidden tiles are skipped and not counted.
For a chunk on a cache it is counted without any mask, though it would need one for the padded keys and the empty
slots.
"""

import functools
import itertools
import sys

import numpy as np

from kernels_pallas import shapes
from kernels_pallas.mask import Mask
from kernels_pallas.tiles import fit
from tests.bench.static_cycles import TOPOLOGIES, CompileError, Kernel, measure

OPTIONS = {
    "compiler_options": {"xla_tpu_scoped_vmem_limit_kib": "49152"}
}  # its best tiles need more than 16 MiB
MASKS = {
    "full": shapes.FULL,
    "causal": shapes.BLOCK_CAUSAL,
    "cached": Mask.full(shapes.CHUNK, shapes.CONTEXT + shapes.CHUNK),
}
# (mask, backward): (block_q, block_kv, block_kv_compute) to try.
_FORWARD = [
    (4096, 1024, 256),
    (2048, 1024, 256),
    (2048, 1024, 1024),
    (1024, 2048, 1024),
    (2048, 2048, 1024),
    (512, 1024, 1024),
]
_BACKWARD = [(512, 512, 512), (1024, 1024, 512), (512, 2048, 512)]
CANDIDATES = {
    ("full", False): _FORWARD,
    ("full", True): _BACKWARD,
    ("causal", False): _FORWARD,
    ("causal", True): _BACKWARD,
    # As few queries past the end as a number of blocks allows.
    ("cached", False): [
        (fit(shapes.CHUNK, q, 128), *rest)
        for q, rest in itertools.product((4096, 8192), ((1024, 256), (2048, 1024)))
    ],
}


# (mask, backward, generation): the candidate with the fewest cycles, as `search` prints them (libtpu 0.0.42.1).
BEST = {
    ("full", False, "v5e"): (1024, 2048, 1024),
    ("full", False, "v5p"): (2048, 2048, 1024),
    ("full", False, "v6e"): (2048, 2048, 1024),
    ("full", False, "tpu7x"): (2048, 2048, 1024),
    ("full", True, "v5e"): (512, 512, 512),
    ("full", True, "v5p"): (512, 512, 512),
    ("full", True, "v6e"): (512, 2048, 512),
    ("full", True, "tpu7x"): (1024, 1024, 512),
    ("causal", False, "v5e"): (2048, 1024, 256),
    ("causal", False, "v5p"): (2048, 1024, 256),
    ("causal", False, "v6e"): (1024, 2048, 1024),
    ("causal", False, "tpu7x"): (1024, 2048, 1024),
    ("causal", True, "v5e"): (512, 512, 512),
    ("causal", True, "v5p"): (512, 512, 512),
    ("causal", True, "v6e"): (512, 2048, 512),
    ("causal", True, "tpu7x"): (512, 2048, 512),
    ("cached", False, "v5e"): (4736, 1024, 256),
    ("cached", False, "v5p"): (4736, 1024, 256),
    ("cached", False, "v6e"): (4736, 2048, 1024),
    ("cached", False, "tpu7x"): (4736, 2048, 1024),
}


def build(devices, block_q: int, block_k: int, compute: int, causal: bool, backward: bool):
    """One head, four tiles long: a tile's schedule does not depend on the length."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    n, m = 4 * block_q, 4 * block_k
    if causal:
        n = m = max(n, m)
    sizes = dict(block_q=block_q, block_kv=block_k, block_kv_compute=compute)
    if backward:
        sizes = dict(block_q=512, block_kv=512, block_kv_compute=512, use_fused_bwd_kernel=True)
        sizes |= dict(block_q_dkv=block_q, block_kv_dkv=block_k, block_kv_dkv_compute=compute)
    mask = masks.CausalMask((n, m)) if causal else masks.FullMask((n, m))
    sizes = kernel.BlockSizes(**sizes)
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([mask]), block_sizes=sizes, head_shards=1, q_seq_shards=1
    )
    local = (lambda q, k, v, g: jax.vjp(attend, q, k, v)[1](g)) if backward else (lambda *x: attend(*x))
    mesh, spec = Mesh(np.array(devices), ("d",)), PartitionSpec("d")
    args = tuple(
        jax.ShapeDtypeStruct(
            (len(devices), length, shapes.HEAD_DIM), jnp.bfloat16, sharding=NamedSharding(mesh, spec)
        )
        for length in (n, m, m, n)[: 4 if backward else 3]
    )
    fn = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * len(args), out_specs=spec, check_vma=False)
    return fn, args


@functools.cache
def kernel(chip: str, causal: bool, backward: bool, blocks: tuple[int, int, int]) -> Kernel:
    """Splash's kernel at one choice of tiles."""
    sizes = dict(zip(("block_q", "block_k", "compute"), blocks, strict=True))
    found = measure("tests.bench.splash:build", chip, causal=causal, backward=backward, **sizes, **OPTIONS)
    return next(k for k in found if ("dkv" if backward else "fwd") in k.name)


def cycles(chip: str, mask: str, backward: bool, blocks: tuple[int, int, int]) -> int:
    """Of one head at the real shape: visible tiles times the cycles of one."""
    tile = kernel(chip, mask == "causal", backward, blocks).variants[0].cycles
    return int((MASKS[mask].tiles(*blocks[:2]) > 0).sum()) * tile


def search() -> dict:
    best = {}
    for (mask, backward), candidates in CANDIDATES.items():
        for chip in TOPOLOGIES:
            costs = {}
            for blocks in candidates:
                try:
                    costs[blocks] = cycles(chip, mask, backward, blocks)
                except CompileError:
                    continue
                print(mask, backward, chip, blocks, costs[blocks], file=sys.stderr, flush=True)
            best[mask, backward, chip] = min(costs, key=costs.get)
    return best


if __name__ == "__main__":
    for key, blocks in search().items():
        print(f"    {key}: {blocks},")
