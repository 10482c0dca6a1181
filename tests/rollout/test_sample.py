"""Sampling of whole clips: equal to a loop written out, deterministic, one compilation, any mesh, k known frames."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.control import keyboard
from lingbot_jax.diffusion import schedule
from lingbot_jax.diffusion.guidance import Guidance
from lingbot_jax.models.codec import to_float
from lingbot_jax.models.dit import Condition
from lingbot_jax.rollout import sample
from lingbot_jax.rollout.sample import sample_clips, sample_config
from lingbot_jax.worlds.clips import Clips, encode, prepare
from lingbot_jax.worlds.condition import conditioning_frames, make_condition
from lingbot_jax.worlds.config import CausalConfig, SampleConfig
from tests.rollout.worlds import TINY, TINY_WORLD, codec, network, world

F, H, W = 9, 16, 32  # video frames and pixels: 3 latent frames of 2 x 4
GUIDED = SampleConfig(steps=3, shift=3.0, solver="euler", guidance=Guidance(3.0, 3.0))
PROMPTS = ("a red door", "a long hall")


def clips(prompts=PROMPTS, order=(0, 1), known=1) -> Clips:
    rng = np.random.default_rng(0)
    keys = keyboard.parse("wl-3,j-5")
    rows = {
        "frames": rng.integers(0, 256, (2, F, H, W, 3), np.uint8),
        "keys": np.stack([keys, keys[::-1]]),
        "c2w": np.stack([keyboard.integrate(keys), keyboard.integrate(keys[::-1])]),
        "intrinsics": np.tile([16.0, 16.0, 16.0, 8.0], (2, F, 1)),
    }
    rows = {name: row[list(order)] for name, row in rows.items()}
    captions = [prompts[i] for i in order]
    return prepare(TINY_WORLD, world().text, rows, np.full(len(order), known), captions)


def test_guided_euler_equals_the_loop_written_out():
    """Uncompiled loop of the definition against the compiled program, batched and sequential guidance."""
    given = clips()
    noise = sample.draw_noise(5, jnp.arange(2), (3, 2, 4, 6))
    shown = np.zeros((2, F, H, W, 3), np.float32)
    shown[:, :1] = given.frames[:, :1] / 127.5 - 1
    mask = np.zeros((2, 3, 2, 4, 4), np.float32)
    mask[:, 0] = 1
    image = codec().encode(jnp.asarray(shown))
    control = make_condition(
        TINY, (2, 4), None, given.camera, conditioning_frames(codec(), shown, given.known)
    ).control
    forward = jax.jit(network())
    conditions = [
        Condition(text=world().text.encode(p), control=control, mask=mask, image=image)
        for p in (PROMPTS, ["", ""])
    ]
    x, levels = noise, schedule.euler(3, 3.0).sigmas
    for now, after in zip(levels[:-1], levels[1:], strict=True):
        v, u = (forward(x, jnp.full((2, 3), 1000 * now), c) for c in conditions)
        x = x + (after - now) * (u + 3.0 * (v - u))
    expected = codec().decode(x)
    for batched in (False, True):
        config = dataclasses.replace(GUIDED, guidance=Guidance(3.0, 3.0, batched))
        np.testing.assert_allclose(sample_clips(world(), given, config, seed=5), expected, atol=1e-4)


def test_two_experts_meet_at_the_boundary():
    """Their steps are those of the one whose region the level is in."""
    two = dataclasses.replace(TINY_WORLD, networks={"high": TINY, "low": TINY}, boundary=0.6)
    given, config = clips(), SampleConfig(steps=4, shift=1.0, solver="euler", guidance=Guidance(1.0, 1.0))
    noise = sample.draw_noise(0, jnp.arange(2), (3, 2, 4, 6))
    encoded = encode(codec(), world().text, given, latents=False)
    condition = make_condition(TINY, (2, 4), encoded.text, encoded.camera, encoded.conditioning)
    experts = {0: jax.jit(network(TINY, 0)), 1: jax.jit(network(TINY, 1))}
    x, levels, used = noise, schedule.euler(4, 1.0).sigmas, []
    for now, after in zip(levels[:-1], levels[1:], strict=True):
        used.append(int(now < 0.6))
        x = x + (after - now) * experts[used[-1]](x, jnp.full((2, 3), 1000 * now), condition)
    assert used == [0, 0, 1, 1]
    np.testing.assert_allclose(sample_clips(world(two), given, config), codec().decode(x), atol=1e-4)


def test_same_seed_same_video_in_any_batch_and_one_compilation():
    both = sample_clips(world(), clips(), seed=1)
    assert both.shape == (2, F, H, W, 3) and np.abs(both).max() <= 1
    compiled = sample.clip._cache_size()
    np.testing.assert_array_equal(both, sample_clips(world(), clips(), seed=1))
    other = sample_clips(world(), clips(), seed=2)
    assert np.abs(other - both).max() > 1e-2
    assert sample.clip._cache_size() == compiled
    flipped = sample_clips(world(), clips(order=(1, 0)), seed=1, indices=[1, 0])
    np.testing.assert_allclose(flipped[::-1], both, atol=1e-5)
    alone = sample_clips(world(), clips(order=(1,)), seed=1, indices=[1])
    np.testing.assert_allclose(alone[0], both[1], atol=1e-5)


def test_only_the_known_frames_are_looked_at():
    """Grey after them, whatever the clip holds there; a continuation knows more of them."""
    whole = clips(known=2)
    cut = dataclasses.replace(whole, frames=np.where(np.arange(F)[:, None, None, None] < 5, whole.frames, 7))
    np.testing.assert_array_equal(sample_clips(world(), whole), sample_clips(world(), cut))
    one = sample_clips(world(), clips(known=1))
    assert np.abs(one - sample_clips(world(), whole)).max() > 1e-2
    encoded = encode(codec(), world().text, whole, latents=False)
    assert encoded.conditioning.mask[:, :2].min() == 1 and encoded.conditioning.mask[:, 2:].max() == 0
    expected = codec().encode(to_float(whole.frames[:, :5]))
    np.testing.assert_allclose(encoded.conditioning.image[:, :2], expected, atol=1e-5)


def test_a_world_says_what_it_is_not():
    alone = dataclasses.replace(TINY_WORLD, networks={"high": TINY})
    with pytest.raises(ConfigError, match="run: has the noise expert 'high' alone.*join it with 'low'"):
        sample_config(alone, "run")
    causal = dataclasses.replace(TINY_WORLD, sample=None, causal=CausalConfig())
    with pytest.raises(ConfigError, match="run: generates chunks.*--mode=fast"):
        sample_config(causal, "run")
    with pytest.raises(ConfigError, match="steps = 0"):
        SampleConfig(steps=0)
