"""Sessions: deterministic, branching, steered by text, flat in memory and time, one compilation."""

import dataclasses
import gc

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.control import keyboard, plucker, poses
from lingbot_jax.diffusion.guidance import Guidance
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.codec import to_uint8
from lingbot_jax.rollout import causal, masks
from lingbot_jax.rollout.cache import KVCache
from lingbot_jax.rollout.session import Session, SessionConfig
from lingbot_jax.worlds.config import CausalConfig, KeyboardConfig, PoseConfig, SampleConfig
from tests.rollout.worlds import TINY, TINY_WORLD, codec, network, text, world

pytestmark = pytest.mark.long

CAUSAL = TINY_WORLD.causal
IMAGE = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)
WALK = np.eye(8, dtype=bool)[keyboard.KEYS.index("W")]
TURN = np.eye(8, dtype=bool)[keyboard.KEYS.index("L")]


def begin(seed: int = 3, **settings) -> Session:
    session = world().session(**{"conditioning_frames": 3} | settings)
    session.start(IMAGE, "a hall", seed=seed)
    return session


def play(session: Session, steps: int, keys=WALK) -> list[np.ndarray]:
    return [session.step(keys) for _ in range(steps)]


def test_same_seed_keys_and_events_give_identical_frames():
    def run(seed):
        session = begin(seed=seed)
        frames = play(session, 2)
        session.set_prompt("snow falls", chunks=2)
        frames += play(session, 3, TURN)
        session.set_prompt("a bird", scope="local", chunks=1)
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
    other.set_prompt("night")
    dark = play(other, 3, TURN)
    np.testing.assert_array_equal(play(session, 3, TURN), expected)  # the branch left the trunk alone
    assert any((a != b).any() for a, b in zip(dark, expected, strict=True))


def many_steps(scale: float, negative: str = "") -> CausalConfig:
    sample = SampleConfig(3, 2.0, "unipc", Guidance(low=scale, high=scale), negative)
    return dataclasses.replace(CAUSAL, sample=sample)


def test_guided_chunks():
    """A negative prompt that is the prompt changes nothing; another one does; the text of both is in the cache."""
    plain = play(begin(causal=many_steps(1.0)), 3)
    same = begin(causal=many_steps(3.0, "a hall"))
    for a, b in zip(plain, play(same, 3), strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1  # guided sums round otherwise
    other = begin(causal=many_steps(3.0, "a forest"))
    assert (play(other, 3)[-1] != plain[-1]).mean() > 0.1
    other.set_prompt("night", rebuild_cache=True)
    play(other, 1)
    cache = other.snapshot().device.cache
    assert cache.keys.shape[1] == 2 and (cache.keys[:, 0] != cache.keys[:, 1]).any()


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
    relative = poses.relative(c2w[::4], "previous", 4 * keyboard.STEP)
    actions = plucker.latent_keys(rows[:, :4], 4)
    state = session._state.device
    condition = jax.jit(type(state).condition)(
        state,
        network(),
        text().encode(["a hall"]),
        jnp.arange(2 * chunks),
        jnp.asarray(relative, jnp.float32),
        jnp.asarray(actions, jnp.float32),
    )
    key = jax.random.key(3)
    cache = KVCache.empty(TINY, causal.cache_layout(CAUSAL, TINY, 2, 4), 1)
    step, made = jax.jit(causal.generate_chunk, static_argnames="config", donate_argnames="cache"), []
    for i in range(chunks):
        noise = causal.draw_noise(key, i, (1, 2, 2, 4, 6), 4)
        part = jax.tree.map(
            lambda x, i=i: x if x.shape[1] != 2 * chunks else x[:, 2 * i : 2 * i + 2], condition
        )
        latents, cache = step(network(), cache, part, noise, CAUSAL)
        made.append(latents)
    video = to_uint8(codec().decode(jnp.concatenate(made, 1))[0])
    difference = np.abs(np.concatenate(frames).astype(int) - np.asarray(video).astype(int))
    assert difference.max() <= 1  # a rounding of float32 sums, not of positions
    assert np.abs(np.asarray(condition.mask)[0, :, 0, 0, 0]).tolist() == [1] + [0] * 9


def test_rebuilding_the_cache_writes_what_the_new_text_would_have_written():
    """The window encoded again under its own text is itself; under another text it is the masked forward."""
    session = begin(causal=dataclasses.replace(CAUSAL, positions="absolute", window=6, sink=2))
    play(session, 3)  # six frames in four slots: the ring has wrapped
    kept = session.snapshot()
    session.set_prompt("a hall", rebuild_cache=True)
    again = session._state.device.cache
    # Frames 0 1 | 4 5: the ring's chunk was first written when it saw 0 1 | 2 3, and now sees 0 1.
    np.testing.assert_array_equal(again.frames, kept.device.cache.frames)
    sink = np.s_[:, :, :2]
    np.testing.assert_allclose(again.keys[sink], kept.device.cache.keys[sink], atol=1e-4)
    session.restore(kept)
    session.set_prompt("night", rebuild_cache=True)
    night = session._state.device
    order = jnp.array([0, 1, 4, 5])
    slots = np.argsort(np.asarray(night.cache.frames))
    condition = jax.jit(type(night).condition)(
        night, network(), text().encode(["night"]), order, night.poses[slots], night.actions[slots]
    )
    mask = masks.chunks(4, 2, 2)
    _, kv = jax.jit(network(), static_argnames="return_kv")(
        night.latents[:, slots],
        jnp.zeros((1, 4)),
        condition,
        attend=Attend(mask=mask),
        positions=order,
        return_kv=True,
    )
    values = kv.values.reshape(*kv.values.shape[:2], 4, 2, *kv.values.shape[3:])
    np.testing.assert_allclose(night.cache.values[:, :, slots], values, atol=1e-4)
    assert np.abs(night.cache.values - kept.device.cache.values).max() > 1e-3


def test_text_switches_blends_and_returns():
    session = begin()
    hall, night, bird = (text().encode([p]) for p in ("a hall", "night", "night a bird"))
    np.testing.assert_array_equal(session.host.tokens(), hall)
    session.set_prompt("night", chunks=1)
    np.testing.assert_allclose(session.host.tokens(), (hall + night) / 2, atol=1e-6)
    session._state = dataclasses.replace(
        session._state, host=dataclasses.replace(session.host, chunk=session.host.chunk + 1)
    )
    np.testing.assert_allclose(session.host.tokens(), night, atol=1e-6)
    session.set_prompt("a bird", scope="local", chunks=1)
    np.testing.assert_allclose(session.host.tokens(), bird, atol=1e-6)
    later = dataclasses.replace(session.host, chunk=session.host.chunk + 1)
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
    held = sum(x.nbytes for x in jax.tree.leaves(session._state.device))
    session.close()
    gc.collect()
    assert sum(x.nbytes for x in jax.live_arrays()) <= after - held  # the cache is gone


def test_a_world_is_played_with_its_own_settings():
    """Poses relative to the first frame, metric, and its own keyboard: what another world would not do (J5)."""
    own = dataclasses.replace(
        TINY_WORLD,
        pose=PoseConfig(reference="first", translation="metric"),
        keyboard=KeyboardConfig(step_size=0.5, turn_rate=9.0),
    )
    session = Session(world(own))
    assert session.config.keyboard == own.keyboard and session.config.causal == own.causal
    session.start(IMAGE, "a hall")
    session.step(WALK)
    rest = session.host.c2w
    np.testing.assert_allclose(rest[:3, 3], [0, 0, 4 * 0.5], atol=1e-9)
    session.step(TURN)
    chunk = session._state.device.poses[2:4]
    expected = np.linalg.inv(np.eye(4)) @ session.host.c2w  # relative to the first frame, in world units
    np.testing.assert_allclose(chunk[-1], expected, atol=1e-5)
    np.testing.assert_allclose(session.host.c2w[:3, :3], keyboard.rotation_y(np.radians(8 * 9.0)), atol=1e-9)


def test_one_rule_for_worlds_that_do_not_generate_chunks(caplog):
    """One network without causal settings: a warning. Two experts: refused (J4)."""
    base = dataclasses.replace(TINY_WORLD, causal=None)
    with caplog.at_level("WARNING"):
        assert SessionConfig.of(base).causal.shift == base.sample.shift
    assert [r.getMessage().count("not post-trained") for r in caplog.records] == [1]
    two = dataclasses.replace(TINY_WORLD, networks={"high": TINY, "low": TINY})
    with pytest.raises(
        ConfigError, match="networks = \\['high', 'low'\\]: chunks need a world of one network"
    ):
        world(two).session()


def test_wrong_use_is_named():
    session = world().session()
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
        session.set_prompt("a bird", scope="local")
    with pytest.raises(ConfigError, match="causal.window = None"):
        world().session(causal=CausalConfig(window=None, sink=0))
    with pytest.raises(ConfigError, match="fov = 180"):
        world().session(fov=180.0)
    odd = begin(causal=CausalConfig(chunk=2, window=7, sink=2))
    with pytest.raises(ConfigError, match="rebuild_cache = 'sink 2, ring 3'"):
        odd.set_prompt("night", rebuild_cache=True)
