"""FLOPs from sizes, bandwidth of mesh axes, the roofline; no compilation."""

import dataclasses

import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.models.config import W14B
from lingbot_jax.models import params
from lingbot_jax.models.dit import WorldDiT
from lingbot_jax.parallel.hlo import Collective, Shape
from lingbot_jax.parallel.plan import (
    Roofline,
    axis_bandwidth,
    chip,
    collective_bytes,
    forward_flops,
)


@dataclasses.dataclass(frozen=True)
class Device:
    coords: tuple[int, int, int]
    slice_index: int | None = None


class Grid:
    """As much of a mesh as bandwidths need."""

    def __init__(self, devices, sizes):
        self.devices = np.empty(sizes, object)
        self.devices.ravel()[:] = devices
        self.shape = dict(zip(("data", "fsdp", "seq"), sizes, strict=True))


@pytest.mark.parametrize("control", ["none", "cam"])
def test_flops_follow_the_parameters(control):
    """Almost every weight meets every token once: 2 FLOPs a weight and token, text aside."""
    config = dataclasses.replace(W14B, control=control)
    flops = forward_flops(config, 21, 60, 104)
    weights = params.count(params.abstract(lambda key: WorldDiT(config, key)))
    text = 40 * 2 * 5120**2 + 4096 * 5120 + 5120**2  # cross-attention k and v, text embedding
    assert flops.tokens == pytest.approx(2 * 32760 * (weights - text), rel=0.02)
    assert flops.text == 2 * 512 * text
    assert flops.attention == 40 * 4 * 32760**2 * 5120


def test_bandwidth_counts_rings_and_wrap_around():
    v5p = chip("v5p:4x4x4")
    cube = [Device((x, y, z)) for x in range(4) for y in range(4) for z in range(4)]
    mesh = Grid(cube, (4, 4, 4))
    assert axis_bandwidth(mesh, ("seq",), v5p) == 2 * v5p.link  # a closed ring of 4
    assert axis_bandwidth(mesh, ("fsdp", "seq"), v5p) == 4 * v5p.link
    strided = sorted(cube, key=lambda d: (d.coords[0] % 2, d.coords))
    assert axis_bandwidth(Grid(strided, (2, 2, 16)), ("fsdp",), v5p) == v5p.link  # two groups interleaved
    v6e = chip("v6e:4x4")
    square = [Device((x, y, 0)) for x in range(4) for y in range(4)]
    assert axis_bandwidth(Grid(square, (1, 4, 4)), ("seq",), v6e) == v6e.link  # a line
    slices = [Device((0, 0, z), s) for s in range(2) for z in range(4)]
    assert axis_bandwidth(Grid(slices, (2, 1, 4)), ("data",), v5p) == v5p.dcn
    with pytest.raises(ConfigError, match="generation 'v9' is not one of v5e, v5p, v6e, tpu7x"):
        chip("v9:2x2")


def test_the_longest_term_binds():
    line = Roofline(1.0, 0.5, 0.4, {"seq": 0.1, "fsdp+seq": 0.3}, model_flops=100.0, peak=100.0)
    assert (line.seconds, line.bound_by) == (1.5, "compute")
    assert line.mfu == pytest.approx(1 / 1.5)
    assert line.mfu_exposed == pytest.approx(1 / 1.9)


def test_collective_bytes_by_kind_and_axis():
    gather = Collective("all-gather", ("seq",), (Shape("bf16", (8,), False),), 1.0, 1, "")
    assert collective_bytes([gather, gather]) == {"all-gather": {"seq": 2}}
