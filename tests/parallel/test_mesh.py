"""Mesh sizes: what is accepted, what "the rest" means, what is refused in one line."""

import dataclasses

import jax
import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.parallel.mesh import MESH_AXES, MeshConfig, arrange, make_mesh


@pytest.mark.parametrize(
    "sizes, devices, resolved",
    [
        ((1, -1, 1), 8, (1, 8, 1)),
        ((2, 2, -1), 8, (2, 2, 2)),
        ((-1, 4, 2), 8, (1, 4, 2)),
        ((2, 2, 2), 8, (2, 2, 2)),
    ],
)
def test_resolve(sizes, devices, resolved):
    assert MeshConfig(*sizes).resolve(devices).sizes == resolved


def test_refusals_name_the_numbers():
    with pytest.raises(ConfigError, match=r"seq = 0"):
        MeshConfig(1, 1, 0)
    with pytest.raises(ConfigError, match=r"only one of data, fsdp, seq may be -1"):
        MeshConfig(-1, -1, 1)
    with pytest.raises(ConfigError, match=r"product 6 must equal the 8 devices"):
        MeshConfig(1, 2, 3).resolve(8)
    with pytest.raises(ConfigError, match=r"product 3 must divide the 8 devices"):
        MeshConfig(1, -1, 3).resolve(8)


def test_one_device():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "seq": 1}


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a TPU device as the arrangement needs; hosts are 2 x 2 x 1 chips."""

    coords: tuple[int, int, int]

    @property
    def process_index(self) -> int:
        x, y, z = self.coords
        return (z * 64 + y // 2) * 64 + x // 2


@pytest.mark.parametrize("shape", [(4, 4, 4), (8, 8, 8), (8, 8, 1), (2, 2, 4), (4, 4, 8)])
@pytest.mark.parametrize("seq", [1, 2, 4, 8])
def test_hosts_share_no_more_samples_than_they_must(shape, seq):
    devices = [Chip(place) for place in np.ndindex(shape)]
    grid = arrange(devices, (1, len(devices) // seq, seq))
    assert sorted(grid.ravel(), key=lambda d: d.coords) == devices
    for row in grid.reshape(-1, max(seq, 4)):  # rows of a host, or hosts of a row
        assert len({device.process_index for device in row}) == max(1, seq // 4)
        places = np.array([device.coords for device in row])
        assert np.prod(np.ptp(places, 0) + 1) == len(row)  # a box of neighbours
