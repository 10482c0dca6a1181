"""The chip of a topology's name and of a device."""

import types

import jax
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.parallel.chips import CHIPS, chip, chip_of


def test_the_chip_of_a_topology_name():
    assert chip("v5p:8x8x4") is CHIPS["v5p"]
    with pytest.raises(ConfigError, match="generation 'v9' is not one of v5e, v5p, v6e, tpu7x"):
        chip("v9:2x2")


@pytest.mark.parametrize(
    "kind, name", [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "tpu7x")]
)
def test_the_chip_of_a_device(kind, name):
    assert chip_of(types.SimpleNamespace(device_kind=kind)) is CHIPS[name]


def test_other_devices_have_none():
    assert chip_of(jax.devices("cpu")[0]) is None
    assert chip_of(types.SimpleNamespace(device_kind="TPU v4")) is None
