"""The tiny networks that the rollout tests share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models import params
from lingbot_jax.models.config import LinearCodecConfig
from lingbot_jax.models.codec import LinearCodec
from lingbot_jax.models.dit import WorldDiT
from lingbot_jax.models.text import HashedNgramEncoder

TINY = DiTConfig(
    dim=48,
    layers=2,
    heads=2,
    ffn=64,
    freq_dim=16,
    text_dim=8,
    text_len=6,
    latent_channels=6,
    mask_channels=4,
    spatial_stride=8,
    control="cam_act",
    dtype="float32",
)
PLAIN = dataclasses.replace(TINY, image_condition=False, control="none")


@functools.cache
def world(config: DiTConfig = TINY, seed: int = 0) -> WorldDiT:
    """A WorldDiT whose every parameter is random and non-zero: a zero head or adapter would hide mistakes.

    Values are drawn in NumPy on the abstract model: nothing is compiled.
    """
    graph, state = nnx.split(params.abstract(lambda key: WorldDiT(config, key)))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        last = path[-2].key if hasattr(path[-2], "key") else str(path[-2])
        scale = leaf.shape[-2] ** -0.5 if last == "kernel" else 0.1
        return jnp.asarray(values * scale + (last == "scale"), jnp.float32)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))


def codec(channels: int = 6, seed: int = 0) -> LinearCodec:
    """A linear codec with a random orthonormal basis."""
    config = LinearCodecConfig(channels=channels)
    features = 3 * int(np.prod(config.stride))
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(features, channels)))[0]
    return LinearCodec(
        basis=jnp.asarray(basis, jnp.float32), mean=jnp.zeros(features), scale=jnp.float32(4.0), config=config
    )


def text() -> HashedNgramEncoder:
    return HashedNgramEncoder(TINY.text_dim, TINY.text_len)
