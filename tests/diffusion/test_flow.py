"""Flow matching against its definition in float64 NumPy and against distribution functions in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.diffusion import flow


def test_path_and_its_inverses_at_one_level_per_latent_frame():
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, 2, 3, 4, 5, 6))
    sigma = rng.uniform(0.05, 0.95, size=(2, 3))
    s = sigma[:, :, None, None, None]
    x = (1 - s) * x0 + s * noise
    np.testing.assert_allclose(flow.add_noise(x0, noise, sigma), x, atol=1e-6)
    np.testing.assert_allclose(flow.velocity_target(x0, noise), noise - x0, atol=1e-6)
    x, v = jnp.asarray(x, jnp.float32), jnp.asarray(noise - x0, jnp.float32)
    np.testing.assert_allclose(flow.x0_from_velocity(x, v, sigma), x0, atol=1e-5)


def test_sigma_must_be_a_prefix_of_the_shape():
    x = jnp.zeros((2, 3, 4, 4, 1))
    with pytest.raises(ValueError, match="prefix"):
        flow.add_noise(x, x, jnp.zeros((3,)))


@pytest.mark.parametrize("region", [(0.0, 1.0), (0.947, 1.0), (0.0, 0.947)])
@pytest.mark.parametrize("shift", [1.0, 3.0, 10.0])
def test_samples_follow_the_shifted_distribution_inside_the_region(shift, region):
    lo, hi = region
    s = np.asarray(flow.sample_sigma(jax.random.key(1), (20000,), shift, region), np.float64)
    assert s.min() >= np.float32(lo) and s.max() <= np.float32(hi)
    # P(S <= s) of the unrestricted law is u(s) = s / (shift - (shift - 1) s); restrict and compare.
    cdf = lambda v: v / (shift - (shift - 1) * v)  # noqa: E731
    expected = (cdf(np.sort(s)) - cdf(lo)) / (cdf(hi) - cdf(lo))
    empirical = (np.arange(s.size) + 0.5) / s.size
    assert np.abs(expected - empirical).max() < 1.63 / np.sqrt(s.size)  # Kolmogorov-Smirnov at 1%


def test_region_is_checked():
    with pytest.raises(ValueError, match="region"):
        flow.sample_sigma(jax.random.key(0), (1,), 3.0, (0.9, 0.5))
