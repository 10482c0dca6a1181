"""Bidirectional sampling: equal to a loop written out, deterministic, one compilation, k given frames."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.diffusion import schedule
from lingbot_jax.diffusion.guidance import Guidance
from lingbot_jax.models.dit import Condition
from lingbot_jax.rollout import bidirectional
from lingbot_jax.rollout.bidirectional import SampleConfig, generate
from tests.rollout.worlds import TINY, codec, text, world

T, H, W = 3, 2, 4  # latent frames and pixels: 9 frames of 16x32
GUIDED = SampleConfig(steps=3, shift=3.0, solver="euler", guidance=Guidance(3.0, 3.0))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return {
        "frames": rng.integers(0, 256, (2, 1, 8 * H, 8 * W, 3), np.uint8),
        "control": rng.normal(size=(2, T, H, W, TINY.control_channels)).astype(np.float32),
        "prompts": ["a red door", "a long hall"],
        "latent_frames": T,
    }


@pytest.fixture(scope="module")
def model():
    return world()


def test_guided_euler_equals_the_loop_written_out(model, inputs):
    """Uncompiled loop of the definition against the compiled program, batched and sequential guidance."""
    noise = bidirectional.draw_noise(5, jnp.arange(2), (T, H, W, 6))
    frames = np.zeros((2, 9, 8 * H, 8 * W, 3), np.float32)
    frames[:, :1] = inputs["frames"] / 127.5 - 1
    mask = np.zeros((2, T, H, W, 4), np.float32)
    mask[:, 0] = 1
    image = codec().encode(jnp.asarray(frames))
    forward = jax.jit(model)
    conditions = [
        Condition(text=text().encode(p), control=inputs["control"], mask=mask, image=image)
        for p in (inputs["prompts"], ["", ""])
    ]
    x, levels = noise, schedule.euler(3, 3.0).sigmas
    for now, after in zip(levels[:-1], levels[1:], strict=True):
        v, u = (forward(x, jnp.full((2, T), 1000 * now), c) for c in conditions)
        x = x + (after - now) * (u + 3.0 * (v - u))
    expected = codec().decode(x)
    for batched in (False, True):
        config = dataclasses.replace(GUIDED, guidance=Guidance(3.0, 3.0, batched))
        video = generate(model, codec(), text(), config=config, seed=5, **inputs)
        np.testing.assert_allclose(video, expected, atol=1e-4)


def test_same_seed_same_video_in_any_batch_and_one_compilation(model, inputs):
    config = SampleConfig(steps=2, shift=3.0, guidance=Guidance(1.0, 1.0))
    both = generate(model, codec(), text(), config=config, seed=1, **inputs)
    assert both.shape == (2, 9, 8 * H, 8 * W, 3)
    compiled = bidirectional._clip._cache_size()
    again = generate(model, codec(), text(), config=config, seed=1, **inputs)
    np.testing.assert_array_equal(both, again)
    other = generate(model, codec(), text(), config=config, seed=2, **inputs)
    assert np.abs(other - both).max() > 1e-2
    assert bidirectional._clip._cache_size() == compiled
    swapped = {k: v[::-1] if k != "latent_frames" else v for k, v in inputs.items()}
    flipped = generate(model, codec(), text(), config=config, seed=1, indices=[1, 0], **swapped)
    np.testing.assert_allclose(flipped[::-1], both, atol=1e-5)


def test_continuation_gives_the_frames_to_the_model(inputs):
    frames = jnp.asarray(np.random.default_rng(3).uniform(-1, 1, (1, 5, 16, 32, 3)), jnp.float32)
    mask, image = bidirectional.given_frames(codec(), frames, 4)
    assert mask[:, :2].min() == 1 and mask[:, 2:].max() == 0
    np.testing.assert_allclose(image[:, :2], codec().encode(frames), atol=1e-5)
    with pytest.raises(ConfigError, match="given frames = 6: must be 4n \\+ 1"):
        bidirectional.given_frames(codec(), jnp.zeros((1, 6, 16, 32, 3)), 4)
    with pytest.raises(ConfigError, match="given frames = 17"):
        bidirectional.given_frames(codec(), jnp.zeros((1, 17, 16, 32, 3)), 4)


def test_wrong_sizes_name_the_field(model, inputs):
    config = SampleConfig(steps=2)
    with pytest.raises(ConfigError, match="multiples of the codec's strides"):
        generate(model, codec(), text(), config=config, **{**inputs, "frames": np.zeros((2, 1, 15, 32, 3))})
    with pytest.raises(ConfigError, match="prompts = 1"):
        generate(model, codec(), text(), config=config, **{**inputs, "prompts": ["x"]})
    with pytest.raises(ConfigError, match="sample.steps = 0"):
        SampleConfig(steps=0)
