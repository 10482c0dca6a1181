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


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def test_every_logical_axis_is_in_the_table():
    assert set(sharding.PARAMETER_RULES) == set(ax.LOGICAL_AXES)


def test_parameters_are_split_over_fsdp_and_seq():
    placed = by_path(sharding.shardings(params.abstract(Model), MESH))
    specs = {path: s.spec for path, s in placed.items()}
    assert specs == {
        "blocks.scale.value": PartitionSpec(None, SPLIT),
        "blocks.up.value": PartitionSpec(None, SPLIT, None),
        "head.value": PartitionSpec(SPLIT, None),
    }


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nnx.state(m, nnx.Param)], ids=["module", "state"])
def test_optimiser_moments_follow_their_parameters(wrap):
    model = wrap(params.abstract(Model))
    state = jax.eval_shape(optax.adamw(1e-3).init, model)
    placed = by_path(sharding.shardings(state, MESH))
    moments = {path: s.spec for path, s in placed.items() if ".mu." in path or ".nu." in path}
    assert len(moments) == 6
    assert all(any(part == SPLIT for part in spec) for spec in moments.values())
    counts = [s.spec for path, s in placed.items() if path.endswith("count")]
    assert counts and all(c == PartitionSpec() for c in counts)


def test_dictionaries_by_path_are_placed_alike():
    model = params.abstract(Model)
    arrays = {path: leaf.get_value() for path, leaf in params.flat_params(model).items()}
    state = jax.eval_shape(optax.adamw(1e-3).init, arrays)
    placed = sharding.shardings_by_path((arrays, state), params.logical_axes(model), MESH)
    specs = [s.spec for s in jax.tree.leaves(placed)]
    assert sum(any(part == SPLIT for part in s) for s in specs) == 9  # parameters and two moments of each
    assert sum(s == PartitionSpec() for s in specs) == len(specs) - 9 > 0


def test_bytes_a_device():
    model = params.abstract(Model)
    model = sharding.specs(model, sharding.shardings(model, MESH))
    assert sharding.count_bytes(model) == 4 * (3 * (16 * 24 + 16) + 16 * 5) // 8


def test_refusals_name_the_numbers():
    with pytest.raises(ConfigError, match=r"'embed' and 'embed' both map to mesh axis 'fsdp'"):
        sharding.spec((ax.EMBED, ax.EMBED))
    with pytest.raises(ConfigError, match=r"'width' is not in the sharding table"):
        sharding.spec(("width",))
    with pytest.raises(ConfigError, match=r"scale \(12,\): 12 does not divide over fsdp x seq = 8 devices"):
        sharding.shardings(params.abstract(lambda key: Block(key, width=12)), MESH)
    with pytest.raises(ConfigError, match=r"mesh axis 'fsdp' is not one of \('rows',\)"):
        sharding.shardings(params.abstract(Block), AbstractMesh((8,), ("rows",)))


def test_without_a_mesh_nothing_happens():
    block = Block(jax.random.key(0))
    assert sharding.gathered(block.up, jnp.bfloat16).dtype == jnp.bfloat16
    tokens = jnp.zeros((1, 2, 3, 4))
    assert sharding.constrain_tokens(tokens) is tokens
    assert sharding.constrain_like(block) is block
