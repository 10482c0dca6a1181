"""The Wan VAE: streams equal whole clips, memory does not grow, real sizes trace, wrong sizes are named."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lingbot_jax.config import ConfigError
from lingbot_jax.models import params
from lingbot_jax.models.config import VAEConfig
from lingbot_jax.models.vae import WanVAE

TINY = VAEConfig(width=4, blocks=1, channels=4, mean=(0.1, -0.2, 0.3, 0.0), std=(1.5, 0.5, 1.0, 2.0))


def random_vae(config: VAEConfig) -> WanVAE:
    """Random parameters from NumPy: compiling the 200 initialisers takes longer than all tests here."""
    graph, state = nnx.split(params.abstract(lambda key: WanVAE(config, key)))
    rng, filled = np.random.default_rng(0), []
    for path, leaf in nnx.to_flat_state(state):
        scale = np.prod(leaf.shape[:-1]) ** -0.5 if path[-1] == "kernel" else 0.1
        value = scale * rng.standard_normal(leaf.shape) + (path[-1] == "scale")
        filled.append((path, leaf.replace(jnp.asarray(value, jnp.float32))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return random_vae(TINY)


@functools.partial(jax.jit, static_argnames="first")
def decode_chunk(vae, latents, stream, first):
    return vae.decode_chunk(latents, stream, first=first)


@functools.partial(jax.jit, static_argnames="first")
def encode_chunk(vae, video, stream, first):
    return vae.encode_chunk(video, stream, first=first)


def noise(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def structure(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def test_streamed_decode_equals_whole_clip(vae):
    latents = noise(1, 2, 6, 2, 3, 4)
    stream = vae.init_stream(2, 2, 3)
    before, parts = structure(stream), []
    for start in range(0, 6, 2):
        frames, stream = decode_chunk(vae, latents[:, start : start + 2], stream, first=start == 0)
        parts.append(frames)
        assert structure(stream) == before
    assert [part.shape[1] for part in parts] == [5, 8, 8]
    whole = jax.jit(WanVAE.decode)(vae, latents)
    assert whole.shape == (2, 21, 16, 24, 3) and float(jnp.abs(whole).max()) <= 1
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)


def test_streamed_encode_equals_whole_clip(vae):
    video = jnp.tanh(noise(2, 2, 21, 16, 24, 3))
    stream = vae.init_encode_stream(2, 16, 24)
    before, parts = structure(stream), []
    for start, end in ((0, 5), (5, 13), (13, 21)):
        latents, stream = encode_chunk(vae, video[:, start:end], stream, first=start == 0)
        parts.append(latents)
        assert structure(stream) == before
    assert [part.shape[1] for part in parts] == [2, 2, 2]
    whole = jax.jit(WanVAE.encode)(vae, video)
    assert whole.shape == (2, 6, 2, 3, 4) and float(whole.std()) > 0.01
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)
    # Causal: what comes later does not change what came before.
    changed = jax.jit(WanVAE.encode)(vae, video.at[:, 5:].set(0.0))
    np.testing.assert_allclose(changed[:, :2], whole[:, :2], atol=1e-6)
    assert float(jnp.abs(changed[:, 2] - whole[:, 2]).max()) > 1e-4


def test_decode_memory_does_not_grow_with_length(vae):
    """Temporary memory of a compiled whole-clip decode, beside the frames it returns."""

    def temporaries(frames: int) -> tuple[int, int]:
        latents = jax.ShapeDtypeStruct((1, frames, 8, 8, 4), jnp.float32)
        memory = jax.jit(WanVAE.decode).lower(vae, latents).compile().memory_analysis()
        return memory.temp_size_in_bytes, memory.output_size_in_bytes

    short, long = temporaries(2), temporaries(16)
    # Frames before and after clipping and the move of the batch axis are temporaries of the output's size.
    growth = long[0] - short[0]
    assert growth <= 3.2 * (long[1] - short[1]), (short, long)
    # A stream gives its frames away: its step needs the same memory whatever came before.
    stream = jax.eval_shape(lambda: vae.init_stream(1, 8, 8))
    latents = jax.ShapeDtypeStruct((1, 1, 8, 8, 4), jnp.float32)
    step = decode_chunk.lower(vae, latents, stream, first=False).compile().memory_analysis()
    assert step.temp_size_in_bytes <= 1.2 * short[0]


@pytest.mark.parametrize(("height", "width"), [(480, 832), (720, 1280), (832, 480), (1280, 720)])
def test_published_size_traces(height, width):
    config = VAEConfig(dtype="bfloat16")
    model = params.abstract(lambda key: WanVAE(config, key))
    assert params.count(model) == 126_892_531
    video = jax.ShapeDtypeStruct((1, 81, height, width, 3), jnp.float32)
    latents = jax.eval_shape(WanVAE.encode, model, video)
    assert latents.shape == (1, 21, height // 8, width // 8, 16)
    assert jax.eval_shape(WanVAE.decode, model, latents).shape == video.shape


def test_untrained_round_trip_keeps_shapes_and_bfloat16_is_near(vae):
    """bfloat16 compute against float32, both from the same parameters."""
    latents = 0.5 * noise(3, 1, 3, 2, 3, 4)
    low = random_vae(dataclasses.replace(TINY, dtype="bfloat16"))
    near = jax.jit(WanVAE.decode)(low, latents)
    assert near.dtype == jnp.float32
    error = near - jax.jit(WanVAE.decode)(vae, latents)
    assert 0 < float(jnp.sqrt(jnp.mean(error**2))) < 0.02


def test_a_float32_codec_is_not_rounded_to_bfloat16(vae):
    """TPUs take one pass of bfloat16 for a float32 product that does not say how precise it is."""
    video = jax.ShapeDtypeStruct((1, 5, 16, 16, 3), jnp.float32)
    program = jax.jit(lambda vae, video: vae.decode(vae.encode(video))).trace(vae, video)
    lines = program.lower(lowering_platforms=("tpu",)).as_text().splitlines()
    products = [line for line in lines if "stablehlo.dot_general" in line or "stablehlo.convolution" in line]
    assert len(products) > 20
    assert all("[HIGH, HIGH]" in line or line.count("precision HIGH>") == 2 for line in products)


def test_wrong_sizes_are_named(vae):
    with pytest.raises(ConfigError, match="video height = 20: must be a multiple of 8"):
        vae.init_encode_stream(1, 20, 16)
    with pytest.raises(ConfigError, match=r"frames = 4: must be 4n \+ 1"):
        jax.eval_shape(vae.encode, jax.ShapeDtypeStruct((1, 4, 16, 16, 3), jnp.float32))
    with pytest.raises(ConfigError, match="frames = 3: must be a multiple of 4"):
        stream = jax.eval_shape(lambda: vae.init_encode_stream(1, 16, 16))
        video = jax.ShapeDtypeStruct((1, 3, 16, 16, 3), jnp.float32)
        jax.eval_shape(functools.partial(vae.encode_chunk, first=False), video, stream)
    with pytest.raises(ConfigError, match="std"):
        VAEConfig(channels=1, mean=(0.0,), std=(0.0,))
    with pytest.raises(ConfigError, match="mean = .* needs 4 channels"):
        VAEConfig(channels=4)
    with pytest.raises(ConfigError, match="time_strides"):
        VAEConfig(mults=(1, 2))
