"""Our attention kernels beside splash attention: static cycles a tile times tiles, on four TPU generations.

For each shape of `kernels_pallas.shapes`, one head at head_dim 128, bfloat16: the cycles of an unmasked and of a
masked tile (`static_cycles`) times how many of each the mask has, for our bounded form and for
`jax.experimental.pallas.ops.tpu.splash_attention` with the best of its tiles on that generation. Splash counts as
if all of its tiles were unmasked, which favours it. `bound` is what the matrix units need for the visible pairs.
"""

import dataclasses
import functools
import math

import numpy as np

from kernels_pallas import shapes, tiles
from kernels_pallas.mask import Mask
from kernels_pallas.steps import CLEAR, MASKED, Plan
from tests.bench.static_cycles import CHIPS, TOPOLOGIES, CompileError, Kernel, measure

# Splash's tiles (block_q, block_kv, block_kv_compute): the best on each generation of a search over q 256..4096,
# kv 512..2048, compute 128..1024 at non-causal 8,192 tokens; the scoped VMEM limit is raised where they need it.
SPLASH_FORWARD = {
    "v5e": (4096, 1024, 256),
    "v5p": (4096, 1024, 256),
    "v6e": (2048, 1024, 1024),
    "tpu7x": (2048, 1024, 1024),
}
SPLASH_BACKWARD = {
    "v5e": (512, 512, 512),
    "v5p": (512, 512, 512),
    "v6e": (512, 2048, 512),
    "tpu7x": (512, 2048, 512),
}
SPLASH_OPTIONS = {"compiler_options": {"xla_tpu_scoped_vmem_limit_kib": "49152"}}
CACHED = Mask.full(shapes.CHUNK, shapes.CONTEXT + shapes.CHUNK)


@dataclasses.dataclass(frozen=True)
class Row:
    """Cycles of one head at one shape, ours and splash's."""

    case: str
    chip: str
    ours: int
    splash: int
    bound: int
    vmem: float

    def __str__(self):
        return (
            f"kernels {self.case:<22} {self.chip:<6} cycles {self.ours:>9,} splash {self.splash:>9,}"
            f" ratio {self.ours / self.splash:.3f}  MXU bound {self.bound:>9,} ({self.bound / self.ours:.2f} of peak)"
            f"  VMEM {self.vmem:.1f} MiB"
        )


def build_splash(devices, block_q: int, block_k: int, compute: int, backward: bool = False):
    """Splash attention on one head of full attention, four tiles long; its tile does not depend on the length."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    seq = 4 * max(block_q, block_k)
    sizes = dict(block_q=block_q, block_kv=block_k, block_kv_compute=compute)
    if backward:
        sizes = dict(block_q=512, block_kv=512, block_kv_compute=512, use_fused_bwd_kernel=True)
        sizes |= dict(block_q_dkv=block_q, block_kv_dkv=block_k, block_kv_dkv_compute=compute)
    mask = masks.MultiHeadMask([masks.FullMask((seq, seq))])
    attend = kernel.make_splash_mha(
        mask, block_sizes=kernel.BlockSizes(**sizes), head_shards=1, q_seq_shards=1
    )
    local = (lambda q, k, v, g: jax.vjp(attend, q, k, v)[1](g)) if backward else (lambda *x: attend(*x))
    mesh, spec = Mesh(np.array(devices), ("d",)), PartitionSpec("d")
    arg = jax.ShapeDtypeStruct(
        (len(devices), seq, shapes.HEAD_DIM), jnp.bfloat16, sharding=NamedSharding(mesh, spec)
    )
    count = 4 if backward else 3
    fn = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * count, out_specs=spec, check_vma=False)
    return fn, (arg,) * count


@functools.cache
def splash(chip: str, backward: bool) -> tuple[Kernel, tuple[int, int]]:
    """The kernel at its best tile, and the tile."""
    block_q, block_k, compute = (SPLASH_BACKWARD if backward else SPLASH_FORWARD)[chip]
    found = measure(
        "tests.bench.kernels:build_splash",
        chip,
        block_q=block_q,
        block_k=block_k,
        compute=compute,
        backward=backward,
        **SPLASH_OPTIONS,
    )
    name = "dkv" if backward else "fwd"
    return next(k for k in found if name in k.name), (block_q, block_k)


def build(devices, case: str):
    from kernels_pallas import aot_cases

    return aot_cases.CASES[case](devices)


@functools.cache
def ours(chip: str, case: str) -> dict[str, Kernel]:
    """Kernels of a case by name, compiled at the real shape."""
    return {k.name.split(".")[0]: k for k in measure("tests.bench.kernels:build", chip, case=case)}


def splash_tiles(mask: Mask, block_q: int, block_k: int) -> int:
    """Visible tiles of splash, which wants lengths that are multiples of its blocks and skips hidden ones."""
    return int((mask.tiles(block_q, block_k) > 0).sum())


def our_cycles(kernel: Kernel, plan: Plan) -> int:
    """Unmasked tiles at the first variant's cycles, masked ones at the last's."""
    kinds = plan.kinds()
    clear, masked = int((kinds == CLEAR).sum()), int((kinds == MASKED).sum())
    return clear * kernel.variants[0].cycles + masked * kernel.variants[-1].cycles


def row(chip: str, case: str) -> Row:
    """One shape on one generation."""
    backward, cached = case.endswith("backward"), case.startswith("cached")
    mask = CACHED if cached else shapes.BLOCK_CAUSAL if "causal" in case else shapes.FULL
    chosen = tiles.choose(chip, mask.n, shapes.CONTEXT if cached else mask.m, shapes.HEAD_DIM)
    tile = chosen.backward if backward else chosen.bounded
    name = f"flash_backward_{tile.form}" if backward else "flash_forward_bounded"
    # The backward program holds the forward kernels too, so one compilation serves both cases of a mask.
    compiled = case if cached else case.replace("forward", "backward")
    kernel = ours(chip, compiled)[name]
    if cached:
        plan = Plan(shapes.CACHED, tile.block_q, tile.block_k, slots=shapes.CONTEXT, limited=True)
    else:
        plan = Plan(mask, tile.block_q, tile.block_k, "keys" if backward else "queries")
    theirs, (block_q, block_k) = splash(chip, backward)
    if cached:
        # The fewest padded rows splash can have: its tile scaled to the largest block that wastes least.
        rows = math.ceil(mask.n / 128) * 128 / block_q
        total = int(rows * math.ceil(mask.m / block_k) * theirs.variants[0].cycles)
    else:
        total = splash_tiles(mask, block_q, block_k) * theirs.variants[0].cycles
    products = 10 if backward else 4
    bound = products * mask.pairs * shapes.HEAD_DIM // CHIPS[chip].flops
    return Row(case, chip, our_cycles(kernel, plan), total, bound, kernel.vmem / 2**20)


CASES = (
    "flash_full_forward",
    "flash_full_backward",
    "flash_block_causal_forward",
    "flash_block_causal_backward",
    "cached_forward",
)


def run(chips=tuple(TOPOLOGIES)) -> list[str]:
    """The printed rows. 28 compilations: minutes on two cores."""
    rows = []
    for chip in chips:
        for case in CASES:
            try:
                rows.append(str(row(chip, case)))
            except CompileError as error:
                rows.append(f"kernels {case:<22} {chip:<6} did not compile: {error}")
            print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    run()
