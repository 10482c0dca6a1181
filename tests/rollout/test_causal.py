"""The causal rollout: cached equals masked, one compilation, donated cache, work hoisted out of the steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.dit import Condition
from lingbot_jax.rollout import causal, masks
from lingbot_jax.rollout.cache import KVCache
from lingbot_jax.worlds.config import CausalConfig
from tests.rollout.worlds import TINY, network

pytestmark = pytest.mark.long

H, W = 2, 4  # latent pixels: 2 tokens per latent frame
FRAMES = 12


def condition(frames: int, seed: int = 0) -> Condition:
    rng = np.random.default_rng(seed)
    draw = lambda c: jnp.asarray(rng.normal(size=(1, frames, H, W, c)), jnp.float32)
    return Condition(
        text=jnp.asarray(rng.normal(size=(1, TINY.text_len, TINY.text_dim)), jnp.float32),
        control=draw(TINY.control_channels),
        mask=draw(TINY.mask_channels),
        image=draw(TINY.latent_channels),
    )


def parts(whole: Condition, chunk: int) -> list[Condition]:
    """The conditions of consecutive chunks."""
    cut = lambda x, i: None if x is None else x[:, i : i + chunk]
    fields = ("control", "mask", "image")
    return [
        dataclasses.replace(whole, **{f: cut(getattr(whole, f), i) for f in fields})
        for i in range(0, whole.image.shape[1], chunk)
    ]


def forward(model, cache: KVCache, latents, timestep, part: Condition):
    """Velocity of a chunk at any noise level, and the cache with it: what training under the mask computes."""
    attend = causal.attend_cached(model, cache, Attend())
    velocity, kv = model(
        latents, timestep, part, attend=attend, positions=cache.positions(latents.shape[1]), return_kv=True
    )
    return velocity, cache.write(kv, model.config)


def empty(config: CausalConfig, frames: int = FRAMES) -> KVCache:
    return KVCache.empty(TINY, causal.cache_layout(config, TINY, H, W, frames), 1)


# The windows wrap around inside a chunk: the ring is not a multiple of it, and in the last one is smaller.
WINDOWS = [(1, None, 0), (3, None, 0), (1, 4, 1), (3, 9, 1), (3, 5, 1)]


@pytest.mark.parametrize(("chunk", "window", "sink"), WINDOWS)
def test_chunks_with_a_cache_equal_the_masked_forward(chunk, window, sink):
    config = CausalConfig(chunk=chunk, window=window, sink=sink, positions="absolute")
    whole, model = condition(FRAMES), network()
    rng = np.random.default_rng(1)
    latents = jnp.asarray(rng.normal(size=(1, FRAMES, H, W, 6)), jnp.float32)
    timestep = jnp.asarray(rng.uniform(0, 1000, size=(1, FRAMES)), jnp.float32)
    mask = masks.chunks(FRAMES, chunk, 2, window=window, sink=sink)
    expected = jax.jit(model)(latents, timestep, whole, attend=Attend(mask=mask))
    step = jax.jit(lambda *args: forward(*args), donate_argnums=1)
    cache, found = empty(config), []
    for i, part in enumerate(parts(whole, chunk)):
        now = slice(i * chunk, (i + 1) * chunk)
        velocity, cache = step(model, cache, latents[:, now], timestep[:, now], part)
        found.append(velocity)
    assert step._cache_size() == 1
    np.testing.assert_allclose(jnp.concatenate(found, 1), expected, atol=1e-4)


generate_chunk = jax.jit(causal.generate_chunk, static_argnames="config", donate_argnames="cache")


def generated(config: CausalConfig, chunks: int, seed: int = 2, step=None) -> tuple[np.ndarray, KVCache]:
    """Chunk after chunk with one compiled program."""
    step = step or generate_chunk
    cache, key, out = empty(config, chunks * config.chunk), jax.random.key(seed), []
    for i, part in enumerate(parts(condition(chunks * config.chunk), config.chunk)):
        noise = causal.draw_noise(key, i, (1, config.chunk, H, W, 6), len(config.levels))
        latents, cache = step(network(), cache, part, noise, config)
        out.append(np.asarray(latents))
    return np.concatenate(out, 1), cache


PLAY = CausalConfig(chunk=2, window=8, sink=2)


def test_one_compilation_for_any_length_and_the_cache_is_donated():
    traces = []

    @functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
    def counted(model, cache, part, noise, config):
        traces.append(1)
        return causal.generate_chunk(model, cache, part, noise, config)

    short, _ = generated(PLAY, 2, step=counted)
    long, cache = generated(PLAY, 9, step=counted)
    assert len(traces) == 1 and counted._cache_size() == 1
    assert int(cache.count) == 18 and sorted(cache.frames.tolist()) == [0, 1, 14, 15, 16, 17]
    assert np.isfinite(long).all()
    before = empty(PLAY)
    noise = causal.draw_noise(jax.random.key(0), 0, (1, 2, H, W, 6), 4)
    lowered = counted.lower(network(), before, condition(2), noise, PLAY)
    held = before.keys.nbytes + before.values.nbytes
    assert lowered.compile().memory_analysis().alias_size_in_bytes >= held
    counted(network(), before, condition(2), noise, PLAY)
    assert before.keys.is_deleted() and before.values.is_deleted()


def test_relative_positions_without_a_sink_give_the_same_velocities():
    """Rotary attention sees differences of positions only, so moving the window's origin changes nothing."""
    config = CausalConfig(chunk=2, window=6, sink=0)
    relative, cache = generated(config, 6)
    absolute, _ = generated(dataclasses.replace(config, positions="absolute"), 6)
    assert int(cache.positions(2)[-1]) == 5  # never beyond the window
    np.testing.assert_allclose(relative, absolute, atol=2e-4)


def test_play_has_no_end():
    """A chunk of a full window does not know how long the play has lasted: 100,000 turns of the ring change no bit."""
    _, cache = generated(PLAY, 9)
    turns = 100_000 * cache.layout.ring
    late = dataclasses.replace(
        cache,
        frames=jnp.where(cache.frames < PLAY.sink, cache.frames, cache.frames + turns),
        count=cache.count + turns,
    )
    late = jax.tree.map(jnp.copy, late)
    noise = causal.draw_noise(jax.random.key(5), 0, (1, 2, H, W, 6), 4)
    expected, after = generate_chunk(network(), cache, condition(2), noise, PLAY)
    found, much_later = generate_chunk(network(), late, condition(2), noise, PLAY)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(much_later.keys, after.keys)
    assert (
        sorted((much_later.frames - turns).tolist()[2:])
        == sorted(after.frames.tolist()[2:])
        == [16, 17, 18, 19]
    )


def test_a_window_forgets_and_a_sink_remembers():
    """Changing the first chunk's noise reaches chunk 5 through a sink, and through nothing else."""

    def last_chunk(config, seed):
        cache = empty(config)
        for i, part in enumerate(parts(condition(12), 2)):
            key = jax.random.key(seed if i == 0 else 7)
            noise = causal.draw_noise(key, i, (1, 2, H, W, 6), 4)
            latents, cache = generate_chunk(network(), cache, part, noise, config)
        return np.asarray(latents)

    sink = CausalConfig(chunk=2, window=8, sink=2)
    assert np.abs(last_chunk(sink, 0) - last_chunk(sink, 1)).max() > 1e-4
    # A window of the chunk alone: no cache at all, so nothing can be remembered.
    alone = CausalConfig(chunk=2, window=2, sink=0)
    np.testing.assert_array_equal(last_chunk(alone, 0), last_chunk(alone, 1))


def flops(fn, *args) -> float:
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def test_the_step_loop_holds_only_what_depends_on_the_noise_level():
    """XLA counts the body of a loop once: program minus its cache-update pass alone = a step of the loop and the last
    step, which follows it, as compiled."""
    cache, part = empty(PLAY), condition(2)
    noise = causal.draw_noise(jax.random.key(0), 0, (1, 2, H, W, 6), 4)
    model = network()

    def program(cache, part, noise):
        return causal.generate_chunk(model, cache, part, noise, PLAY)

    def update_pass(cache, part, noise):
        return forward(model, cache, noise[0], jnp.zeros((1, 2)), model.precompute(part))[1]

    def one_step(context, x, condition):
        return model(x, jnp.full((1, 2), 5.0), condition, attend=Attend(context=context))

    context = cache.context(TINY)
    steps = flops(program, cache, part, noise) - flops(update_pass, cache, part, noise)
    hoisted = flops(one_step, context, noise[0], model.precompute(part))
    whole = flops(one_step, context, noise[0], part)
    assert whole > 1.2 * hoisted  # there is something to hoist
    assert steps < 2 * hoisted + 0.1 * (whole - hoisted), (steps, hoisted, whole)
    assert steps > 1.8 * hoisted, "the loop is not counted: the comparison says nothing"


def test_wrong_configurations_name_the_field():
    for message, values in {
        "window = 4: must hold sink \\+ chunk": {"chunk": 3, "window": 4, "sink": 2},
        "sink = 2: means nothing": {"window": None, "sink": 2},
        "chunk = 0": {"chunk": 0},
        "levels = \\(\\)": {"levels": ()},
    }.items():
        with pytest.raises(ConfigError, match=message):
            CausalConfig(**values)
    absolute = CausalConfig(positions="absolute")
    causal.check_length(absolute, 65536)
    with pytest.raises(ConfigError, match="positions = 'absolute': must be relative beyond 65536"):
        causal.check_length(absolute, 65539)
    with pytest.raises(ConfigError, match="causal.window = None: play without"):
        causal.cache_layout(CausalConfig(window=None, sink=0), TINY, H, W)
