"""Play on eight devices, parameters whole on each, gives the frames of one device; so does a decoder cut in columns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lingbot_jax.models import params
from lingbot_jax.models.config import VAEConfig
from lingbot_jax.models.vae import WanVAE
from lingbot_jax.parallel.mesh import MeshConfig, make_mesh
from lingbot_jax.parallel.sharding import columns_spec
from lingbot_jax.rollout import device
from lingbot_jax.worlds.world import World, specs
from tests.rollout.worlds import TINY_WORLD, codec, network, text

NETWORK = dataclasses.replace(TINY_WORLD.network, heads=8, dim=96, layers=1)
CAUSAL = dataclasses.replace(TINY_WORLD.causal, levels=(0, 500))
CONFIG = dataclasses.replace(TINY_WORLD, networks={"world": NETWORK}, causal=CAUSAL)
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)  # 8 tokens per frame
WALK = np.eye(8, dtype=bool)[0]
ALONE = make_mesh(MeshConfig(), jax.devices()[:1])
EIGHT = make_mesh(MeshConfig(fsdp=1, seq=8, weights="whole"))


def play(mesh) -> tuple[np.ndarray, np.ndarray]:
    """Frames of three chunks, and the clean latents that the window keeps."""
    model = network(NETWORK)
    placed = {path: spec.sharding for path, spec in specs(model, mesh).items()}
    assert all(place.is_fully_replicated for place in placed.values())
    model = params.with_arrays(model, jax.device_put(params.arrays_of(model), placed))
    session = World({"world": model}, codec(), text(), CONFIG, mesh).session(conditioning_frames=3)
    session.start(IMAGE, "a hall", seed=3)
    frames = np.concatenate([session.step(WALK) for _ in range(3)])
    return frames, np.asarray(session.snapshot().device.latents)


def test_frames_of_a_session_are_those_of_one_device():
    (frames, latents), (wanted, alone) = play(EIGHT), play(ALONE)
    assert np.abs(alone).max() > 0.5 and np.ptp(wanted) > 50
    np.testing.assert_allclose(latents, alone, atol=1e-4 * np.abs(alone).max())
    assert np.abs(frames.astype(int) - wanted).max() <= 1


def test_a_decoder_in_columns_is_that_of_one_device():
    """Convolutions see their neighbours' columns; the stream stays in columns."""
    config = VAEConfig(width=8, mults=(1, 2), time_strides=(True,), blocks=1)
    vae = WanVAE(config, jax.random.key(0))
    latents = jax.random.normal(jax.random.key(1), (1, 2, 4, 16, config.channels))
    made = {}
    for mesh in (ALONE, EIGHT):
        with jax.set_mesh(mesh):
            stream = jax.tree.map(jnp.zeros_like, vae.init_stream(1, 4, 16))
            frames, after = device.decode(vae, latents, stream, first=False)
            places = [NamedSharding(mesh, columns_spec(leaf.shape)) for leaf in jax.tree.leaves(after)]
        for leaf, place in zip(jax.tree.leaves(after), places, strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
        made[mesh.size] = np.asarray(frames).astype(int), jax.device_get(after)
    assert any("seq" in str(place.spec) for place in places) and places[0].spec != PartitionSpec()
    assert np.ptp(made[1][0]) > 50
    assert np.abs(made[8][0] - made[1][0]).max() <= 1
    for got, want in zip(*(jax.tree.leaves(made[n][1]) for n in (8, 1)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
