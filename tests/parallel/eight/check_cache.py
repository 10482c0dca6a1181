"""The cache stays where it is: a chunk on eight devices is compiled once, and gives the cache back as it was."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lingbot_jax.models.attention import KV, Attend
from lingbot_jax.models.dit import Condition, WorldDiT
from lingbot_jax.parallel.mesh import MeshConfig, make_mesh
from lingbot_jax.parallel.sequence import attention_kernel
from lingbot_jax.rollout.cache import CacheLayout, KVCache
from tests.rollout.worlds import PLAIN, world

CONFIG = dataclasses.replace(PLAIN, heads=4, dim=48, layers=2)
PLACE = PartitionSpec(None, ("data", "fsdp"), None, None, "seq")  # layers b slots p h k
BATCH, CHUNK, SIZE = 4, 2, (4, 4)  # latent pixels: 4 tokens per frame


@functools.partial(jax.jit, donate_argnames="cache")
def chunk(model: WorldDiT, cache: KVCache, latents: jax.Array, text: jax.Array, attend: Attend):
    attend = dataclasses.replace(attend, context=cache.context(CONFIG))
    velocity, kv = model(
        latents,
        jnp.full((BATCH, CHUNK), 500.0),
        Condition(text=text),
        attend=attend,
        positions=cache.positions(CHUNK),
        return_kv=True,
    )
    return velocity, cache.write(kv, CONFIG)


def play(mesh, steps=3):
    model = world(CONFIG)
    attend = Attend(kernel=attention_kernel(mesh, CONFIG.heads))
    text = jax.random.normal(jax.random.key(1), (BATCH, CONFIG.text_len, CONFIG.text_dim))
    noise = jax.random.normal(jax.random.key(2), (steps, BATCH, CHUNK, *SIZE, CONFIG.latent_channels))
    layout = CacheLayout(sink=1, ring=3, rows=2, columns=2, positions="relative")
    with jax.set_mesh(mesh):
        cache = KVCache.empty(CONFIG, layout, BATCH)
        places, velocities, before = [cache.keys.sharding], [], chunk._cache_size()
        for latents in noise:
            velocity, cache = chunk(model, cache, latents, text, attend)
            velocities.append(velocity)
            places += [cache.keys.sharding, cache.values.sharding]
    return velocities, places, chunk._cache_size() - before


def test_a_chunk_is_compiled_once_and_the_cache_does_not_move():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, seq=2))
    velocities, places, programs = play(mesh)
    wanted = NamedSharding(mesh, PLACE)
    assert all(place.is_equivalent_to(wanted, 6) for place in places), places
    assert programs == 1
    alone, _, _ = play(make_mesh(MeshConfig(), jax.devices()[:1]))
    for got, want in zip(velocities, alone, strict=True):
        assert np.abs(want).max() > 1e-2
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_a_write_puts_a_cache_in_its_place():
    """As after `restore`: whatever the cache's own placement, what a write returns is as `empty` gives it."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, seq=2))
    cache = KVCache.empty(CONFIG, CacheLayout(sink=1, ring=3, rows=2, columns=2), BATCH)
    whole = NamedSharding(mesh, PartitionSpec())
    frames = jnp.ones((CONFIG.layers, BATCH, 4 * CHUNK, CONFIG.heads, CONFIG.head_dim))
    cache, kv = jax.device_put((cache, KV(frames, frames)), whole)
    with jax.set_mesh(mesh):
        after = jax.jit(lambda cache, kv: cache.write(kv, CONFIG))(cache, kv)
    assert after.keys.sharding.is_equivalent_to(NamedSharding(mesh, PLACE), 6)
    assert after.values.sharding.is_equivalent_to(NamedSharding(mesh, PLACE), 6)
