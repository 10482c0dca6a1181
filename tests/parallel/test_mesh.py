"""Mesh sizes: what is accepted, what "the rest" means, what is refused in one line."""

import jax
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.parallel.mesh import MESH_AXES, MeshConfig, make_mesh


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
    with pytest.raises(ConfigError, match=r"mesh.seq = 0"):
        MeshConfig(1, 1, 0)
    with pytest.raises(ConfigError, match=r"only one axis may be -1"):
        MeshConfig(-1, -1, 1)
    with pytest.raises(ConfigError, match=r"product 6 must equal the 8 devices"):
        MeshConfig(1, 2, 3).resolve(8)
    with pytest.raises(ConfigError, match=r"product 3 must divide the 8 devices"):
        MeshConfig(1, -1, 3).resolve(8)


def test_one_device():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "seq": 1}
