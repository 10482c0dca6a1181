"""The convolutional codec: its linear parts against NumPy, its stream, its training."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.models import params
from lingbot_jax.models.codec import Codec, fit_linear
from lingbot_jax.models.config import ConvCodecConfig, LinearCodecConfig
from lingbot_jax.models.conv_codec import LINEAR, ConvCodec, fit_conv, reconstruction_loss
from lingbot_jax.training.codec import train_codec

CONFIG = ConvCodecConfig(channels=12, width=8, blocks=1)


def videos(count: int = 6, frames: int = 9, seed: int = 0) -> np.ndarray:
    """Discs of one colour that move over a plain ground."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :40]
    out = np.empty((count, frames, 32, 40, 3), np.float32)
    for video in out:
        ground, disc = rng.uniform(-0.9, 0.9, (2, 3))
        at, speed, radius = rng.uniform(5, 30, 2), rng.uniform(-1.5, 1.5, 2), rng.uniform(5, 12)
        for i, frame in enumerate(video):
            inside = (y - at[0] - i * speed[0]) ** 2 + (x - at[1] - i * speed[1]) ** 2 < radius**2
            frame[:] = np.where(inside[..., None], disc, ground)
    return out


@pytest.fixture(scope="module")
def fitted() -> ConvCodec:
    return fit_conv(lambda: [videos()[:3], videos()[3:]], CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def lively() -> ConvCodec:
    """Every parameter at random: nothing is hidden by a zero."""
    made = params.abstract(lambda key: ConvCodec(CONFIG, key))
    rng = np.random.default_rng(3)
    arrays = {
        k: jnp.asarray(rng.normal(0, 0.2, a.shape), jnp.float32) for k, a in params.arrays_of(made).items()
    }
    return params.with_arrays(made, arrays | {"std": jnp.linspace(0.5, 2.0, CONFIG.channels)})


def test_is_a_codec(fitted):
    assert isinstance(fitted, Codec)
    latents = fitted.encode(jnp.asarray(videos()))
    assert latents.shape == (6, 3, 4, 5, 12)
    assert fitted.decode(latents).shape == videos().shape
    assert fitted.config.stride == (4, 8, 8) and fitted.config.latent_frames(9) == 3


def test_a_stream_equals_the_whole(lively):
    latents = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 3, 4, 12)), jnp.float32)
    whole = lively.decode_raw(latents, (), first=True)
    stream, parts, at = lively.init_stream(2, 3, 4), [], 0
    for size in (1, 2, 1, 2):
        chunk = latents[:, at : at + size]
        parts.append(lively.decode_raw(chunk, stream, first=at == 0))
        clipped, stream = lively.decode_chunk(chunk, stream, first=at == 0)
        np.testing.assert_allclose(clipped, np.clip(parts[-1], -1, 1), atol=1e-6)
        at += size
    scale = float(jnp.abs(whole).max())
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5 * scale)
    assert (
        float(jnp.abs(whole[:, 1:5] - lively.decode_raw(latents[:, 1:2], latents[:, 1:2], first=False)).max())
        > 0.01
    )


def test_it_is_causal_and_sees_across_borders(lively):
    video = jnp.asarray(videos())
    np.testing.assert_allclose(lively.encode(video[:, :5]), lively.encode(video)[:, :2], rtol=1e-4, atol=1e-4)
    latents = lively.encode(video)
    changed = lively.decode_raw(latents.at[:, 1, 1, 1].add(1.0), (), first=True) - lively.decode_raw(
        latents, (), first=True
    )
    touched = np.abs(np.asarray(changed)).max(axis=(0, -1)) > 1e-6
    assert not touched[0].any(), "the past does not change"
    assert touched[1:, 0:8, 0:8].any() and touched[5:, 8:16, 8:16].any(), "neighbours and the next latent do"


def test_the_linear_decoder_is_least_squares(fitted):
    """Against NumPy in float64: the best map from 3 x 3 latents and those before to patches."""
    video = np.asarray(videos())
    latents = np.asarray(fitted.encode(jnp.asarray(video)), np.float64)
    before = np.concatenate([latents[:, :1], latents[:, :-1]], axis=1)
    seen = np.pad(np.concatenate([latents, before], -1), ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [seen[:, :, i : i + 4, j : j + 5] for i in range(3) for j in range(3)]
    x = np.concatenate([*taps, np.ones_like(taps[0][..., :1])], -1).reshape(-1, 9 * 24 + 1)
    still = np.concatenate([np.repeat(video[:, :1], 4, axis=1), video[:, 1:]], axis=1).astype(np.float64)
    y = still.reshape(6, 3, 4, 4, 8, 5, 8, 3).transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, 768)
    best = np.square(y - x @ np.linalg.lstsq(x, y, rcond=None)[0]).mean()
    mine = np.square(
        y - x @ np.concatenate([np.asarray(fitted.context).reshape(-1, 768), [fitted.context_bias[...]]])
    ).mean()
    linear = fit_linear([videos()], LinearCodecConfig(channels=12))
    alone = np.square(video - np.asarray(linear.decode(linear.encode(jnp.asarray(video))))).mean()
    assert best <= mine < alone
    assert mine < best + 0.2 * (alone - best)


def test_latents_are_normalised_and_whitened(fitted):
    latents = np.asarray(fitted.encode(jnp.asarray(videos()))).reshape(-1, 12)
    np.testing.assert_allclose(np.square(latents).mean(), 1.0, rtol=1e-3)
    plain, white = (
        np.asarray(
            fit_conv(
                lambda: [videos()],
                ConvCodecConfig(channels=12, width=8, blocks=1, whitening=w),
                jax.random.key(0),
            ).encode(jnp.asarray(videos()))
        )
        .reshape(-1, 12)
        .std(0)
        for w in (0.0, 1.0)
    )
    half = latents.std(0)
    np.testing.assert_allclose(white, 1.0, rtol=0.02)
    ratio = lambda s: s[0] / s[-1]
    np.testing.assert_allclose(ratio(half), np.sqrt(ratio(plain)), rtol=0.02)


def test_training_lowers_the_loss_and_leaves_the_latents(fitted):
    frames = np.uint8((videos() + 1) * 127.5)
    loss = jax.jit(lambda c: reconstruction_loss(c, jnp.asarray(videos()), jax.random.key(1), 0.0))
    trained = train_codec(fitted, itertools.repeat(frames), steps=60, rate=0.03, noise=0.02, seed=0)
    assert float(loss(trained)) < 0.97 * float(loss(fitted))
    for name in LINEAR:
        np.testing.assert_array_equal(params.arrays_of(trained)[name], params.arrays_of(fitted)[name])


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="strides"):
        ConvCodecConfig(strides=(4, 7, 8))
    with pytest.raises(ConfigError, match="channels"):
        ConvCodecConfig(channels=1000)
    with pytest.raises(ConfigError, match="no clips"):
        fit_conv(list, CONFIG, jax.random.key(0))
