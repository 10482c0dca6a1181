"""Sessions: deterministic, branching, steered by text, flat in memory and time, one compilation."""

import dataclasses
import gc

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.control import keyboard
from lingbot_jax.models.attention import Attend
from lingbot_jax.rollout import causal, masks, stream
from lingbot_jax.rollout.cache import KVCache
from lingbot_jax.rollout.causal import CausalConfig
from lingbot_jax.rollout.stream import Session, SessionConfig
from tests.rollout.worlds import TINY, codec, text, world

CONFIG = SessionConfig(CausalConfig(chunk=2, window=8, sink=2), lead=3)
IMAGE = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)
WALK = np.eye(8, dtype=bool)[keyboard.KEYS.index("W")]
TURN = np.eye(8, dtype=bool)[keyboard.KEYS.index("L")]


def begin(config: SessionConfig = CONFIG, seed: int = 3) -> Session:
    session = Session(world(), codec(), text(), config)
    session.start(IMAGE, "a hall", seed=seed)
    return session


def play(session: Session, steps: int, keys=WALK) -> list[np.ndarray]:
    return [session.step(keys) for _ in range(steps)]


def test_same_seed_keys_and_events_give_identical_frames():
    def run(seed):
        session = begin(seed=seed)
        frames = play(session, 2)
        session.say("snow falls", chunks=2)
        frames += play(session, 3, TURN)
        session.say("a bird", scope="local", chunks=1)
        return np.concatenate(frames + play(session, 2))

    once = run(3)
    assert once.shape == (5 + 6 * 8, 16, 32, 3) and once.dtype == np.uint8
    np.testing.assert_array_equal(once, run(3))
    assert (once != run(4)).mean() > 0.1


def test_a_restored_snapshot_and_a_branch_continue_identically():
    session = begin()
    play(session, 5)
    snapshot = session.snapshot()
    expected = play(session, 3, TURN)
    for _ in range(2):  # a snapshot is not used up
        session.restore(snapshot)
        np.testing.assert_array_equal(play(session, 3, TURN), expected)
    session.restore(snapshot)
    other = session.branch()
    other.say("night")
    dark = play(other, 3, TURN)
    np.testing.assert_array_equal(play(session, 3, TURN), expected)  # the branch left the trunk alone
    assert any((a != b).any() for a, b in zip(dark, expected, strict=True))


def test_steps_equal_a_rollout_of_the_whole_clip():
    """Poses, keys, given frames, positions and streaming decode of a session against one masked-free rollout."""
    session, chunks = begin(), 5
    keys = np.random.default_rng(1).random((8 * chunks, 8)) < 0.3
    keys[:, [4, 6]] = False  # integrate's pitch limit is not the subject
    frames, at = [], 0
    for _ in range(chunks):
        rows = keys[at : at + session.transitions]
        at += len(rows)
        frames.append(session.step(rows))
    rows = np.concatenate([np.zeros((1, 8), bool), keys[:at]])
    c2w = keyboard.integrate(rows)
    relative = stream.poses.relative(c2w[::4], "previous", 4 * keyboard.STEP)
    held = stream.plucker.latent_keys(rows[:, :4], 4)
    plays = session._state.play
    condition = stream._condition(
        TINY,
        codec(),
        plays,
        jnp.asarray(text().encode(["a hall"])),
        jnp.arange(2 * chunks),
        jnp.asarray(relative, jnp.float32),
        jnp.asarray(held),
    )
    key = jax.random.key(3)
    noise = jnp.stack([causal.draw_noise(key, i, (1, 2, 2, 4, 6), 4) for i in range(chunks)])
    cache = KVCache.empty(TINY, CONFIG.causal.layout(TINY, 2, 4), 1)
    latents, _ = jax.jit(causal.rollout, static_argnames="config")(
        world(), cache, condition, noise, CONFIG.causal
    )
    video = stream.to_uint8(codec().decode(latents)[0])
    difference = np.abs(np.concatenate(frames).astype(int) - np.asarray(video).astype(int))
    assert difference.max() <= 1  # a rounding of float32 sums, not of positions
    assert np.abs(np.asarray(condition.mask)[0, :, 0, 0, 0]).tolist() == [1] + [0] * 9


def test_reencoding_writes_what_the_new_text_would_have_written():
    """The window encoded again under its own text is itself; under another text it is the masked forward."""
    config = dataclasses.replace(
        CONFIG, causal=dataclasses.replace(CONFIG.causal, positions="absolute", window=6, sink=2)
    )
    session = begin(config)
    play(session, 3)  # six frames in four slots: the ring has wrapped
    kept = session.snapshot()
    session.say("a hall", reencode=True)
    again = session._state.play.cache
    # Frames 0 1 | 4 5: the ring's chunk was first written when it saw 0 1 | 2 3, and now sees 0 1.
    np.testing.assert_array_equal(again.frames, kept.play.cache.frames)
    sink = np.s_[:, :, :2]
    np.testing.assert_allclose(again.keys[sink], kept.play.cache.keys[sink], atol=1e-4)
    session.restore(kept)
    session.say("night", reencode=True)
    night = session._state.play
    order = jnp.array([0, 1, 4, 5])
    slots = np.argsort(np.asarray(night.cache.frames))
    condition = stream._condition(
        TINY,
        codec(),
        night,
        jnp.asarray(text().encode(["night"])),
        order,
        night.relative[slots],
        night.held[slots],
    )
    mask = masks.chunks(4, 2, 2)
    _, kv = jax.jit(world(), static_argnames="return_kv")(
        night.latents[:, slots],
        jnp.zeros((1, 4)),
        condition,
        attend=Attend(mask=mask),
        positions=order,
        return_kv=True,
    )
    values = kv.values.reshape(*kv.values.shape[:2], 4, 2, *kv.values.shape[3:])
    np.testing.assert_allclose(night.cache.values[:, :, slots], values, atol=1e-4)
    assert np.abs(night.cache.values - kept.play.cache.values).max() > 1e-3


def test_text_switches_blends_and_returns():
    session = begin()
    hall, night, bird = (text().encode([p]) for p in ("a hall", "night", "night a bird"))
    np.testing.assert_array_equal(session.walk.tokens(), hall)
    session.say("night", chunks=1)
    np.testing.assert_allclose(session.walk.tokens(), (hall + night) / 2, atol=1e-6)
    session._state = dataclasses.replace(
        session._state, walk=dataclasses.replace(session.walk, chunk=session.walk.chunk + 1)
    )
    np.testing.assert_allclose(session.walk.tokens(), night, atol=1e-6)
    session.say("a bird", scope="local", chunks=1)
    np.testing.assert_allclose(session.walk.tokens(), bird, atol=1e-6)
    later = dataclasses.replace(session.walk, chunk=session.walk.chunk + 1)
    np.testing.assert_allclose(later.tokens(), night, atol=1e-6)


def test_long_play_compiles_nothing_and_keeps_its_memory():
    session = begin()
    play(session, 6)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    gc.collect()
    before = sum(x.nbytes for x in jax.live_arrays())
    play(session, 40)
    gc.collect()
    after = sum(x.nbytes for x in jax.live_arrays())
    assert not compiled
    assert after <= before * 1.001
    held = sum(x.nbytes for x in jax.tree.leaves(session._state.play))
    session.close()
    gc.collect()
    assert sum(x.nbytes for x in jax.live_arrays()) <= after - held  # the cache is gone


def test_wrong_use_is_named():
    session = Session(world(), codec(), text(), CONFIG)
    with pytest.raises(RuntimeError, match="call start"):
        session.step(WALK)
    with pytest.raises(ConfigError, match="image height = 15: must be a multiple of 16"):
        session.start(np.zeros((15, 32, 3), np.uint8), "a hall")
    with pytest.raises(ConfigError, match="prompt = ' ': is empty"):
        session.start(IMAGE, " ")
    session.start(IMAGE, "a hall")
    with pytest.raises(ConfigError, match="keys = \\(3, 8\\): must be \\(4, 8\\)"):
        session.step(np.zeros((3, 8)))
    with pytest.raises(ConfigError, match="chunks = 0: must be at least 1"):
        session.say("a bird", scope="local")
    with pytest.raises(ConfigError, match="causal.window = None"):
        SessionConfig(CausalConfig(window=None, sink=0))
    odd = begin(SessionConfig(CausalConfig(chunk=2, window=7, sink=2), lead=3))
    with pytest.raises(ConfigError, match="reencode = 'sink 2, ring 3'"):
        odd.say("night", reencode=True)
