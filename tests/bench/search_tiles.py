"""Searches the tiles of every kernel on every generation by static cycles and writes kernels_pallas/tile_table.py.

    python -m tests.bench.search_tiles

A block has one size on all generations, so that one figure of FLOPs holds for a tile (`aot_cases.TILE_FLOPS`): the
one with the smallest sum over generations of cycles over the best there. Chunk and form are each generation's own.
"""

import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas import shapes
from kernels_pallas.context import Context
from kernels_pallas.flash_backward import flash_backward
from kernels_pallas.flash_forward import flash_forward
from kernels_pallas.mask import Mask
from kernels_pallas.steps import Plan
from kernels_pallas.tiles import BackwardTiles, ForwardTiles
from tests.bench.static_cycles import CHIPS, TOPOLOGIES, CompileError, measure, plan_cycles

HEAD_DIM = 128
# The masks a kernel's tiles are weighed by, at 480p; a chunk on a cache has tiles of its own.
MASKS = {
    "fixed_max": (shapes.FULL, shapes.BLOCK_CAUSAL),
    "stale_max": (shapes.FULL, shapes.BLOCK_CAUSAL),
    "backward": (shapes.FULL, shapes.BLOCK_CAUSAL),
    "cached": (shapes.CACHED,),
}
CANDIDATES = {
    "fixed_max": [((q, 1024), (c,)) for q, c in itertools.product((1024, 2048), (512, 1024))],
    "cached": [((q, k), (c,)) for q in (2432, 4736) for k, c in ((1024, 512), (1280, 256), (1280, 640))],
    "stale_max": [((q, 1024), (c,)) for q, c in itertools.product((512, 1024), (512, 1024))],
    "backward": [
        (block, (chunk, form))
        for block, chunk, form in itertools.product(
            ((1024, 1024), (2048, 1024)), (256, 512), ("rows", "columns")
        )
    ],
}


def build(devices, kind: str, block: tuple[int, int], rest: tuple):
    """One kernel on four blocks; block-causal, so that it has a masked variant too. Lengths change no schedule."""
    n = 4 * max(block)
    mask, mesh, spec = Mask.block_causal(n, n // 4 + 8), Mesh(np.array(devices), ("d",)), PartitionSpec("d")
    if kind == "backward":
        tiles = BackwardTiles(*block, *rest, vmem_limit=48 << 20)
        plan = Plan(mask, *block, "keys")
        local = lambda q, k, v, out, lse, g: flash_backward(q, k, v, out, lse, g, plan, tiles)
        arrays = ["rows"] * 4 + ["lse", "rows"]
    elif kind == "cached":
        tiles = ForwardTiles(*block, *rest, vmem_limit=48 << 20)
        valid = jnp.zeros((3, 2), jnp.int32)
        local = lambda q, k, v, keys, values: flash_forward(
            q, k, v, Mask.full(n, n), tiles, form="fixed_max", context=Context(keys, values, valid)
        )
        arrays = ["rows"] * 5
    else:
        tiles = ForwardTiles(*block, *rest, vmem_limit=48 << 20)
        local = lambda q, k, v: flash_forward(q, k, v, mask, tiles, form=kind)
        arrays = ["rows"] * 3
    shapes = {"rows": ((1, n, 1, HEAD_DIM), jnp.bfloat16), "lse": ((1, 1, n), jnp.float32)}
    args = tuple(
        jax.ShapeDtypeStruct(
            (len(devices), *shapes[a][0][1:]), shapes[a][1], sharding=NamedSharding(mesh, spec)
        )
        for a in arrays
    )
    fn = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * len(args), out_specs=spec, check_vma=False)
    return fn, args


def cost(chip: str, kind: str, block: tuple[int, int], rest: tuple) -> float:
    """Static cycles over the bound of the matrix units, added up over `MASKS`; infinite where refused.

    Hidden tiles cost nothing, boundary tiles what the masked variant takes: large blocks have fewer cycles a pair
    and more pairs that are computed for nothing.
    """
    try:
        kernel = measure("tests.bench.search_tiles:build", chip, kind=kind, block=block, rest=rest)[0]
    except CompileError as error:
        print(chip, kind, block, rest, f"refused: {error}", flush=True)
        return float("inf")
    backward = kind == "backward"
    products = 10 if backward else 4
    over = []
    for mask in MASKS[kind]:
        plan = Plan(
            mask, *block, "keys" if backward else "queries", shapes.CONTEXT if kind == "cached" else 0
        )
        pairs = mask.pairs + plan.slots * mask.n
        over.append(plan_cycles(kernel, plan) * CHIPS[chip].flops / (products * pairs * HEAD_DIM))
    tile = [
        round(v.cycles * 2**20 / (block[0] * block[1])) for v in (kernel.variants[0], kernel.variants[-1])
    ]
    print(
        f"{chip:<6} {kind:<9} {block} {rest}: cycles a 1024 x 1024 {tile[0]}, masked {tile[1]};"
        f" over the bound {', '.join(f'{x:.3f}' for x in over)}; {kernel.vmem / 2**20:.1f} MiB",
        flush=True,
    )
    return sum(over)


def _best(costs: dict[tuple, float], chip: str, block: tuple[int, int]) -> tuple[float, tuple]:
    """(cost, chunk and form) of the best candidate with this block."""
    return min((v, rest) for (c, b, rest), v in costs.items() if (c, b) == (chip, block))


def search() -> dict[tuple[str, str], tuple]:
    table = {}
    for kind, candidates in CANDIDATES.items():
        costs = {(chip, *c): cost(chip, kind, *c) for chip in TOPOLOGIES for c in candidates}
        blocks = sorted({block for block, _ in candidates})

        def loss(block, costs=costs, blocks=blocks):
            least = {chip: min(_best(costs, chip, b)[0] for b in blocks) for chip in TOPOLOGIES}
            return sum(_best(costs, chip, block)[0] / least[chip] for chip in TOPOLOGIES)

        block = min(blocks, key=loss)
        table |= {(chip, kind): (*block, *_best(costs, chip, block)[1]) for chip in TOPOLOGIES}
    return table


def main() -> None:
    path = pathlib.Path(sys.modules[flash_forward.__module__].__file__).parent / "tile_table.py"
    docstring = path.read_text().split("TABLE")[0]
    lines = "".join(f"    {key!r}: {value!r},\n" for key, value in sorted(search().items()))
    path.write_text(f"{docstring}TABLE = {{\n{lines}}}\n".replace("'", '"'))


if __name__ == "__main__":
    main()
