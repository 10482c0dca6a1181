"""Bandwidth of mesh axes and the roofline; no compilation."""

import dataclasses

import numpy as np
import pytest

from lingbot_jax.parallel.chips import chip
from lingbot_jax.planning.collectives import Collective
from lingbot_jax.planning.hlo import Shape
from lingbot_jax.planning.roofline import Roofline, axis_bandwidth, collective_bytes


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


def test_the_longest_term_binds():
    line = Roofline(1.0, 0.5, 0.4, {"seq": 0.1, "fsdp+seq": 0.3}, model_flops=100.0, peak=100.0)
    assert (line.seconds, line.bound_by) == (1.5, "compute")
    assert line.mfu == pytest.approx(1 / 1.5)
    assert line.mfu_exposed == pytest.approx(1 / 1.9)


def test_collective_bytes_by_kind_and_axis():
    gather = Collective("all-gather", ("seq",), (Shape("bf16", (8,), False),), 1.0, 1, "")
    assert collective_bytes([gather, gather]) == {"all-gather": {"seq": 2}}
