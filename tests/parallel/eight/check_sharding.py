"""Placement on real (virtual) devices: initialisation, gathers, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from lingbot_jax import axes as ax
from lingbot_jax.config import ConfigError
from lingbot_jax.models import params
from lingbot_jax.models.config import UMT5Config
from lingbot_jax.models.text import UMT5, TextTokens, UMT5Encoder
from lingbot_jax.parallel import sharding
from lingbot_jax.parallel.mesh import MeshConfig, make_mesh
from tests.convert.published import tokenizer


class Block(nnx.Module):
    def __init__(self, key):
        self.up = params.param(key, (16, 24), (ax.EMBED, ax.MLP))
        self.down = params.param(key, (24, 16), (ax.MLP, ax.EMBED))

    def __call__(self, x):
        x = sharding.constrain_tokens(x)
        return x + sharding.linear(jax.nn.silu(sharding.linear(x, self.up)), self.down)


def loss(block, x):
    return jnp.mean(block(x) ** 2)


def test_eight_devices():
    assert jax.device_count() == 8


def placed(module, mesh):
    """The module with every array in its place."""
    arrays = params.arrays_of(module)
    places = sharding.shardings_by_path(arrays, params.logical_axes(module), mesh)
    return params.with_arrays(module, jax.device_put(arrays, places))


def test_parameters_are_split():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, seq=2))
    block = placed(Block(jax.random.key(3)), mesh)
    assert block.up[...].sharding.spec == PartitionSpec(("fsdp", "seq"), None)
    assert block.up[...].addressable_shards[0].data.shape == (2, 24)


def test_gather_in_the_loss_scatter_in_the_gradient():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, seq=2))
    block = Block(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 3, 6, 16))
    want_loss, want = jax.value_and_grad(loss)(block, x)
    block, x = placed(block, mesh), jax.device_put(x, sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(loss)).lower(block, x).compile()
    got_loss, got = compiled(block, x)
    np.testing.assert_allclose(got_loss, want_loss, rtol=1e-6)
    assert got.up[...].sharding.is_equivalent_to(block.up[...].sharding, 2)
    np.testing.assert_allclose(got.up[...], want.up[...], atol=1e-6)
    np.testing.assert_allclose(got.down[...], want.down[...], atol=1e-6)
    gathers = [line for line in compiled.as_text().splitlines() if " all-gather(" in line]
    assert gathers and not any("f32[2,3,6" in line for line in gathers), "activations were gathered"


def test_uneven_tokens_are_refused():
    mesh = make_mesh(MeshConfig(1, 2, 4))
    with jax.set_mesh(mesh):
        with pytest.raises(ConfigError, match="tokens per latent frame: 6 does not divide over seq = 4"):
            jax.eval_shape(Block(jax.random.key(0)), jnp.zeros((2, 3, 6, 16)))
        with pytest.raises(ConfigError, match="batch: 3 does not divide over data x fsdp = 2"):
            jax.eval_shape(Block(jax.random.key(0)), jnp.zeros((3, 3, 8, 16)))


TEXT = UMT5Config(
    vocab=40,
    dim=16,
    heads=2,
    head_dim=4,
    ffn=24,
    layers=2,
    buckets=8,
    max_distance=16,
    length=6,
    dtype="float32",
)


@pytest.mark.parametrize("texts", [8, 1])  # 1: does not divide over data x fsdp
def test_texts_are_encoded_on_the_mesh_and_no_table_is_gathered(texts):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, seq=2))
    make = lambda key: UMT5(TEXT, key)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 7, texts)
    tokens = TextTokens(rng.integers(0, 40, (texts, 6)).astype(np.int32), np.arange(6) < lengths[:, None])
    words = tokenizer()  # part of an encoder; what it made is above
    encode = lambda encoder, tokens: encoder(tokens)
    model = jax.jit(make)(jax.random.key(0))
    alone = jax.jit(encode)(UMT5Encoder(model, words), tokens)
    encoder = UMT5Encoder(placed(model, mesh), words)
    assert encoder.model.embedding[...].sharding.spec == PartitionSpec(None, ("fsdp", "seq"))
    with jax.set_mesh(mesh):
        compiled = jax.jit(encode).lower(encoder, tokens).compile()
        np.testing.assert_allclose(compiled(encoder, tokens), alone, rtol=1e-4, atol=1e-5)
    assert "f32[40,16]" not in compiled.as_text()  # the whole table
