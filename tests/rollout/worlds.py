"""A tiny world on a mesh of one device, shared by the tests of rollout, evaluation and the package."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from lingbot_jax.models import params
from lingbot_jax.models.codec import LinearCodec
from lingbot_jax.models.config import DiTConfig, LinearCodecConfig, NgramConfig
from lingbot_jax.models.text import HashedNgramEncoder
from lingbot_jax.parallel.mesh import MeshConfig, make_mesh
from lingbot_jax.worlds import storage
from lingbot_jax.worlds.config import CausalConfig, SampleConfig, WorldConfig
from lingbot_jax.worlds.open import params_folder, write_bundle_config
from lingbot_jax.worlds.world import CODEC, World, template

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
TINY_WORLD = WorldConfig(
    networks={"world": TINY},
    codec=LinearCodecConfig(channels=TINY.latent_channels),
    text=NgramConfig(dim=TINY.text_dim, length=TINY.text_len),
    sample=SampleConfig(steps=2, shift=3.0),
    causal=CausalConfig(chunk=2, window=8, sink=2),
)


@functools.cache
def network(config: DiTConfig = TINY, seed: int = 0):
    """A WorldDiT whose every parameter is random and non-zero: a zero head or adapter would hide mistakes.

    Values are drawn in NumPy on the abstract module: nothing is compiled.
    """
    module, rng = template(config), np.random.default_rng(seed)

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale = leaf.shape[-2] ** -0.5 if path.endswith("kernel") else 0.1
        return jnp.asarray(rng.normal(size=leaf.shape) * scale + path.endswith("scale"), jnp.float32)

    return params.with_arrays(module, {p: draw(p, leaf) for p, leaf in params.arrays_of(module).items()})


@functools.cache
def codec(channels: int = 6, seed: int = 0) -> LinearCodec:
    """A linear codec with a random orthonormal basis."""
    config = LinearCodecConfig(channels=channels)
    features = 3 * int(np.prod(config.stride))
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(features, channels)))[0]
    arrays = {"basis": basis, "mean": np.zeros(features), "scale": np.float64(4.0)}
    return params.with_arrays(template(config), {n: jnp.asarray(a, jnp.float32) for n, a in arrays.items()})


def text() -> HashedNgramEncoder:
    return HashedNgramEncoder(TINY_WORLD.text)


def world(config: WorldConfig = TINY_WORLD) -> World:
    """The world of a config (of one or two networks of any names), on the first device."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    networks = {name: network(net, seed) for seed, (name, net) in enumerate(config.networks.items())}
    return World(networks, codec(), text(), config, mesh)


def write_bundle(folder: pathlib.Path, world: World) -> pathlib.Path:
    """The world as a bundle that `open_world` opens."""
    folder.mkdir(parents=True)
    for name, module in {**world.networks, CODEC: world.codec}.items():
        storage.write(params_folder(folder, name), params.arrays_of(module))
    write_bundle_config(folder, world.config)
    return folder
