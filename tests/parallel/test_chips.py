"""The chip of a topology's name and of a device."""

import jax
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.parallel.chips import CHIPS, chip, chip_of


def test_the_chip_of_a_topology_name():
    assert chip("v5p:8x8x4") is CHIPS["v5p"]
    with pytest.raises(ConfigError, match="generation 'v9' is not one of v5e, v5p, v6e, tpu7x"):
        chip("v9:2x2")


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x1", "v6e:2x4", "tpu7x:2x2x1"])
def test_the_chip_of_a_device(topology):
    """By the name that libtpu itself gives the devices of that generation."""
    pytest.importorskip("libtpu", reason="no libtpu")
    from lingbot_jax.planning.programs import topology_devices

    assert chip_of(topology_devices(topology)[0]) is chip(topology)


def test_other_devices_have_none():
    assert chip_of(jax.devices("cpu")[0]) is None
