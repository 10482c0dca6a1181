"""The linear codec against NumPy's own principal components, its streams, and conditioning frames."""

import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from lingbot_jax.config import ConfigError
from lingbot_jax.models.codec import fit_linear
from lingbot_jax.models.config import LinearCodecConfig
from lingbot_jax.worlds.condition import conditioning_frames


def videos(n=6, f=9, h=16, w=24):
    """Smooth random video, so that few components explain it."""
    rng = np.random.default_rng(0)
    t, y, x = np.meshgrid(np.arange(f), np.arange(h), np.arange(w), indexing="ij")
    a, b, c, p = (rng.uniform(-0.3, 0.3, (n, 1, 1, 1, 3)) for _ in range(4))
    grid = lambda g: g[None, ..., None]
    return np.sin(a * grid(t) + b * grid(y) + c * grid(x) + 9 * p).astype(np.float32) * 0.9


def frames():
    return jnp.asarray(videos())


@pytest.fixture(scope="module")
def codec():
    return fit_linear([videos()[:3], videos()[3:]], LinearCodecConfig(channels=12))


def test_basis_is_that_of_the_singular_value_decomposition(codec):
    v = videos()
    still = np.repeat(v[:, :1], 4, axis=1)
    x = rearrange(
        np.concatenate([still, v[:, 1:]], 1), "b (t s) (h p) (w q) c -> (b t h w) (s p q c)", s=4, p=8, q=8
    )
    centred = x.astype(np.float64) - x.mean(0)
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)
    projector = rows[:12].T @ rows[:12]
    np.testing.assert_allclose(codec.basis[...] @ codec.basis[...].T, projector, atol=2e-4)
    np.testing.assert_allclose(codec.scale[...], np.sqrt((singular[:12] ** 2).mean() / len(x)), rtol=1e-4)


def test_latents_are_normalised_and_reconstruct(codec):
    latents = codec.encode(frames())
    assert latents.shape == (6, 3, 2, 3, 12)
    assert abs(float(latents.mean())) < 0.05 and abs(float(jnp.square(latents).mean()) - 1) < 0.05
    error = np.asarray(codec.decode(latents)) - videos()
    full = fit_linear([videos()], LinearCodecConfig(channels=100))
    assert (
        np.square(np.asarray(full.decode(full.encode(frames()))) - videos()).mean()
        < np.square(error).mean()
        < 0.05
    )


def test_a_prefix_of_frames_is_a_prefix_of_latents(codec):
    np.testing.assert_array_equal(codec.encode(frames()[:, :5]), codec.encode(frames())[:, :2])


def test_stream_equals_the_whole_clip(codec):
    latents = codec.encode(frames())
    stream, parts = codec.init_stream(6, 2, 3), []
    for i in range(latents.shape[1]):
        part, stream = codec.decode_chunk(latents[:, i : i + 1], stream, first=i == 0)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), codec.decode(latents), atol=1e-6)


def test_nothing_to_fit_on():
    with pytest.raises(ConfigError, match="there are no clips"):
        fit_linear([], LinearCodecConfig())


def test_frames_must_fill_groups(codec):
    with pytest.raises(ConfigError, match="frames = 8: must be 4n"):
        codec.encode(frames()[:, :8])


def test_conditioning_shows_known_frames_and_nothing_else(codec):
    video = jnp.asarray(videos()[:2])
    known = conditioning_frames(codec, video, jnp.array([1, 2]))
    assert known.mask.shape == (2, 3, 2, 3, 4)
    np.testing.assert_array_equal(known.mask[:, :, 0, 0, 0], [[1, 0, 0], [1, 1, 0]])
    np.testing.assert_allclose(known.image[1, :2], codec.encode(video)[1, :2], atol=1e-6)
    changed = video.at[0, 1:].set(0.7).at[1, 5:].set(-0.7)
    again = conditioning_frames(codec, changed, jnp.array([1, 2]))
    np.testing.assert_array_equal(again.image, known.image)
