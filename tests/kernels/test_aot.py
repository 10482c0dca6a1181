"""AOT cases, compiled by the real TPU compiler at their real shape: each case and each of four generations.

All cases on all generations: `make bench ARGS=kernels`.
"""

import importlib.util
import os
import re

import jax
import pytest

from kernels_pallas import aot_cases, shapes, tiles
from tests.bench.static_cycles import TOPOLOGIES

pytestmark = pytest.mark.long

no_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu")
CHIPS = list(TOPOLOGIES)


@pytest.fixture(scope="module")
def devices():
    """Topology devices of a generation. libtpu reads its environment once, when it is loaded."""
    from jax.experimental import topologies

    os.environ.update(
        TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1"
    )
    return lambda chip: topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices


@no_libtpu
@pytest.mark.parametrize(
    ("case", "chip"),
    # A backward program contains the forward kernels of its mask, both forms, so these three are all six cases.
    [
        ("flash_full_backward", "v5e"),
        ("flash_full_backward", "tpu7x"),
        ("flash_block_causal_backward", "v5p"),
        ("cached_backward", "v6e"),
    ],
)
def test_compiles(case, chip, devices):
    """Every kernel's VMEM is within its generation's, and HBM in proportion to the arrays' own size."""
    fn, args = aot_cases.CASES[case](devices(chip))
    compiled = jax.jit(fn).lower(*args).compile()
    text = compiled.as_text()
    for kernel in ("flash_forward_fixed_max", "flash_forward_stale_max"):
        assert kernel in text
    assert "flash_backward" in text and ("flash_backward_dq" in text) == ("cached" in case)
    used = [int(x) for x in re.findall(r'"used_scoped_memory_configs":\[[^]]*?"size":"(\d+)"', text)]
    assert len(used) >= (4 if "cached" in case else 3)
    assert 0 < max(used) <= tiles.VMEM_MIB[chip] << 20
    token = shapes.HEAD_DIM * 2
    assert compiled.memory_analysis().temp_size_in_bytes < 24 * shapes.TOKENS * token


@no_libtpu
@pytest.mark.parametrize("case", ["flash_full_forward", "flash_block_causal_forward", "cached_forward"])
def test_forward_cases_lower(case, devices):
    fn, args = aot_cases.CASES[case](devices("v6e"))
    assert "flash_forward_fixed_max" in jax.jit(fn).lower(*args).as_text()


@pytest.mark.parametrize("chip", CHIPS)
def test_tile_flops_hold_on_every_generation(chip):
    """One figure a case: the area of a tile is the same everywhere."""
    full = tiles.choose(chip, shapes.TOKENS, shapes.TOKENS)
    cached = tiles.choose(chip, shapes.CHUNK, shapes.CONTEXT, cached=True)
    area = lambda tile: tile.block_q * tile.block_k * shapes.HEAD_DIM
    flops = aot_cases.TILE_FLOPS
    assert flops.keys() == aot_cases.CASES.keys()
    assert 4 * area(full.fixed_max) == flops["flash_full_forward"] == flops["flash_block_causal_forward"]
    assert 10 * area(full.backward) == flops["flash_full_backward"] == flops["flash_block_causal_backward"]
    assert 4 * area(cached.fixed_max) == flops["cached_forward"]
    assert 6 * area(cached.backward) == flops["cached_backward"]


def test_tiles_fit_the_shape():
    """As many blocks as the table's size gives, as small as that allows."""
    assert tiles.fit(4680, 2048, 128) == 1664 and tiles.fit(32760, 2048, 128) == 2048
    assert tiles.fit(100, 2048, 128) == 128
    with pytest.raises(ValueError, match="chunk = 384"):
        tiles.ForwardTiles(128, 512, 384)
    with pytest.raises(ValueError, match="block_q = 100"):
        tiles.ForwardTiles(100, 512, 128)


def test_generation_names():
    kind = lambda name: type("Device", (), {"device_kind": name})()
    names = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}
    assert {n: tiles.generation(kind(n)) for n in names} == names
    with pytest.raises(ValueError, match="cpu"):
        tiles.generation(kind("cpu"))
