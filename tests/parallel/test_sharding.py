"""The table from logical axes to mesh axes, on an abstract mesh of 2 x 4 x 2 (no devices needed)."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from lingbot_jax import axes as ax
from lingbot_jax.config import ConfigError
from lingbot_jax.models import params
from lingbot_jax.parallel import sharding

MESH = AbstractMesh((2, 4, 2), ("data", "fsdp", "seq"))
SPLIT = ("fsdp", "seq")


class Block(nnx.Module):
    def __init__(self, key, width=16, axes=(ax.EMBED, ax.MLP)):
        self.up = params.param(key, (width, 24), axes)
        self.scale = params.param(key, (width,), (ax.NORM,), params.ones)


class Model(nnx.Module):
    def __init__(self, key):
        self.blocks = params.stack(Block, key, 3)
        self.head = params.param(key, (16, 5), (ax.EMBED, ax.OUTPUT))


def placed(make, mesh=MESH):
    """Shardings of a module's parameters by path."""
    model = params.abstract(make)
    return sharding.shardings_by_path(params.arrays_of(model), params.logical_axes(model), mesh)


def test_every_logical_axis_is_in_the_table():
    assert set(sharding.PARAMETER_RULES) == set(ax.LOGICAL_AXES)


def test_parameters_are_split_over_fsdp_and_seq():
    assert {path: s.spec for path, s in placed(Model).items()} == {
        "blocks.scale": PartitionSpec(None, SPLIT),
        "blocks.up": PartitionSpec(None, SPLIT, None),
        "head": PartitionSpec(SPLIT, None),
    }


def test_optimiser_moments_follow_their_parameters():
    model = params.abstract(Model)
    arrays = params.arrays_of(model)
    state = jax.eval_shape(optax.adamw(1e-3).init, arrays)
    places = sharding.shardings_by_path((arrays, state), params.logical_axes(model), MESH)
    specs = [s.spec for s in jax.tree.leaves(places)]
    assert sum(any(part == SPLIT for part in s) for s in specs) == 9  # parameters and two moments of each
    assert sum(s == PartitionSpec() for s in specs) == len(specs) - 9 > 0


def test_bytes_per_device():
    arrays = sharding.specs(params.arrays_of(params.abstract(Model)), placed(Model))
    assert sharding.count_bytes(arrays) == 4 * (3 * (16 * 24 + 16) + 16 * 5) // 8


def test_refusals_name_the_numbers():
    with pytest.raises(ConfigError, match=r"'embed' and 'embed' both map to mesh axis 'fsdp'"):
        sharding.spec((ax.EMBED, ax.EMBED))
    with pytest.raises(ConfigError, match=r"'width' is not in the sharding table"):
        sharding.spec(("width",))
    with pytest.raises(ConfigError, match=r"scale \(12,\): 12 does not divide over fsdp x seq = 8 devices"):
        placed(lambda key: Block(key, width=12))
    with pytest.raises(ConfigError, match=r"mesh axis 'fsdp' is not one of \('rows',\)"):
        placed(Block, AbstractMesh((8,), ("rows",)))


def test_without_a_mesh_nothing_happens():
    block = Block(jax.random.key(0))
    assert sharding.gathered(block.up, jnp.bfloat16).dtype == jnp.bfloat16
    tokens = jnp.zeros((1, 2, 3, 4))
    assert sharding.constrain_tokens(tokens) is tokens
