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

from kernels_pallas.flash_backward import flash_backward
from kernels_pallas.flash_forward import flash_forward
from kernels_pallas.mask import Mask
from kernels_pallas.steps import Plan
from kernels_pallas.tiles import BackwardTiles, ForwardTiles
from tests.bench.static_cycles import TOPOLOGIES, CompileError, measure

HEAD_DIM = 128
CANDIDATES = {
    "bounded": [((q, 1024), (c,)) for q, c in itertools.product((1024, 2048), (512, 1024))],
    "lagged": [((q, 1024), (c,)) for q, c in itertools.product((512, 1024), (512, 1024))],
    "backward": [
        (block, (chunk, form))
        for block, chunk, form in itertools.product(
            ((1024, 1024), (512, 2048)), (256, 512), ("rows", "columns")
        )
    ],
}


def build(devices, kind: str, block: tuple[int, int], rest: tuple):
    """One kernel on four blocks of full attention; the schedule of a tile does not depend on the length."""
    n = 4 * max(block)
    mask, mesh, spec = Mask.full(n, n), Mesh(np.array(devices), ("d",)), PartitionSpec("d")
    if kind == "backward":
        tiles = BackwardTiles(*block, *rest, vmem_limit=48 << 20)
        plan = Plan(mask, *block, "keys")
        local = lambda q, k, v, out, lse, g: flash_backward(q, k, v, out, lse, g, plan, tiles)
        arrays = ["rows"] * 4 + ["lse", "rows"]
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
    """Static cycles a query-key pair; infinite where the compiler refuses."""
    try:
        kernel = measure("tests.bench.search_tiles:build", chip, kind=kind, block=block, rest=rest)[0]
    except CompileError as error:
        print(chip, kind, block, rest, f"refused: {error}", flush=True)
        return float("inf")
    cycles = kernel.variants[0].cycles / (block[0] * block[1])
    print(
        chip,
        kind,
        block,
        rest,
        f"{cycles * 2**20:.0f} cycles a 1024 x 1024",
        f"{kernel.vmem / 2**20:.1f} MiB",
        flush=True,
    )
    return cycles


def _best(costs: dict[tuple, float], chip: str, block: tuple[int, int]) -> tuple[float, tuple]:
    """(cycles a pair, chunk and form) of the best candidate with this block."""
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
