"""The world loss against numbers worked out by hand, and the mixture it is trained on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.diffusion.flow import unshift_sigma
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.config import LinearCodecConfig
from lingbot_jax.models.codec import LinearCodec
from lingbot_jax.models.condition import image_condition
from lingbot_jax.models.dit import Condition
from lingbot_jax.training.config import FlowConfig, TaskConfig
from lingbot_jax.training.objectives.world import draw_given, world_loss

KEY = jax.random.key(0)


class Stub:
    """In place of a model: answers with the true velocity of a clip it knows, plus an error made by hand."""

    def __init__(self, clean, error):
        self.clean, self.error = clean, error

    def __call__(self, latents, timestep, condition, *, attend):
        self.sigma, self.condition = np.asarray(timestep) / 1000, condition
        sigma = (timestep / 1000)[..., None, None, None]
        # x_s = (1 - s) x0 + s n, so the velocity n - x0 is (x_s - x0) / s.
        return (latents - self.clean) / sigma + self.error(sigma)


def loss_of(error, flow=FlowConfig(), expert="single", tasks=TaskConfig(), batch=64):  # noqa: B008 - frozen
    clean = jnp.full((batch, 3, 1, 2, 2), 0.5)
    stub = Stub(clean, error)
    condition = Condition(
        text=jnp.ones((batch, 2, 3)), control=jnp.ones((batch, 3, 1, 2, 4)), mask=None, image=None
    )
    loss, metrics = world_loss(
        stub, clean, condition, KEY, flow=flow, tasks=tasks, region=flow.region(expert), attend=Attend()
    )
    return stub, float(loss), metrics


def test_loss_is_the_mean_squared_velocity_error():
    for size in (0.0, 0.5, 3.0):
        _, loss, _ = loss_of(lambda sigma, size=size: size)
        np.testing.assert_allclose(loss, size**2, rtol=1e-4, atol=1e-6)
    stub, loss, metrics = loss_of(lambda sigma: sigma)  # wrong by the noise level: E[s^2]
    levels = stub.sigma[:, 0].astype(np.float64)
    np.testing.assert_allclose(loss, (levels**2).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["loss_noisy"], (levels[levels > 0.8] ** 2).mean(), rtol=1e-4)
    assert (stub.sigma == stub.sigma[:, :1]).all(), "the frames of a clip share their noise level"


@pytest.mark.parametrize("shift", [1.0, 5.0, 10.0])
@pytest.mark.parametrize("expert", ["single", "high", "low"])
def test_noise_levels_are_shifted_and_stay_in_the_expert_s_region(expert, shift):
    flow, n = FlowConfig(shift=shift, boundary=0.9), 4000
    stub, _, _ = loss_of(lambda sigma: 0.0, flow, expert, batch=n)
    lo, hi = {"single": (0, 1), "high": (0.9, 1), "low": (0, 0.9)}[expert]
    levels = np.sort(stub.sigma[:, 0].astype(np.float64))
    assert lo - 1e-6 <= levels[0] and levels[-1] <= hi + 1e-6
    # Kolmogorov-Smirnov at 1e-4: undoing the shift must leave a uniform distribution between the bounds' images.
    u_lo, u_hi = unshift_sigma(lo, shift), unshift_sigma(hi, shift)
    uniform = (levels / (shift - (shift - 1) * levels) - u_lo) / (u_hi - u_lo)
    assert np.abs(uniform - (np.arange(n) + 0.5) / n).max() < 2.2 / np.sqrt(n)


def test_tasks_are_mixed_as_configured():
    tasks, n = TaskConfig(continuation=0.3, max_given=5), 40000
    given = np.asarray(draw_given(KEY, n, tasks))
    share = np.bincount(given, minlength=6) / n
    np.testing.assert_allclose(share, [0, 0.7, *[0.3 / 4] * 4], atol=0.01)
    assert set(np.asarray(draw_given(KEY, 100, TaskConfig(continuation=0.0)))) == {1}
    assert set(np.asarray(draw_given(KEY, 1000, TaskConfig(continuation=1.0)))) == {2, 3, 4, 5}


def test_conditions_are_dropped_whole_and_as_often_as_configured():
    n = 4000
    tasks = TaskConfig(text_dropout=0.1, control_dropout=0.25)
    stub, _, _ = loss_of(lambda sigma: 0.0, tasks=tasks, batch=n)
    text = np.asarray(stub.condition.text).reshape(n, -1)
    control = np.asarray(stub.condition.control).reshape(n, -1)
    for values, share in ((text, 0.1), (control, 0.25)):
        assert ((values == 0).all(1) | (values == 1).all(1)).all(), "a sample keeps all of it or nothing"
        np.testing.assert_allclose((values == 0).all(1).mean(), share, atol=0.02)
    both = ((text == 0).all(1) & (control == 0).all(1)).mean()
    np.testing.assert_allclose(both, 0.1 * 0.25, atol=0.01)  # drawn independently


def published_mask(given: int, latent_frames: int) -> np.ndarray:
    """[t 4] as the published image-to-video code builds it: pixel frames, the first one four times, in fours."""
    frames = 4 * (latent_frames - 1) + 1
    mask = np.zeros(frames)
    mask[: 4 * (given - 1) + 1] = 1
    return np.concatenate([np.repeat(mask[:1], 4), mask[1:]]).reshape(latent_frames, 4)


def test_mask_channels_are_the_published_ones():
    codec = LinearCodec(jnp.eye(12 * 4)[:, :3], jnp.zeros(48), jnp.ones(()), LinearCodecConfig(channels=3, strides=(4, 2, 2)))
    video = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, 13, 4, 4, 3)), jnp.float32)
    mask, image = image_condition(codec, video, jnp.array([1, 2, 4]))
    assert mask.shape == (3, 4, 2, 2, 4)
    for sample, given in enumerate((1, 2, 4)):
        want = published_mask(given, 4)[:, None, None]
        np.testing.assert_array_equal(mask[sample], np.broadcast_to(want, mask.shape[1:]))
    # Behind the given frames the conditioning latent is that of mid-grey, and nothing of the clip is in it.
    grey = codec.encode(jnp.zeros_like(video))
    np.testing.assert_array_equal(image[0, 1:], grey[0, 1:])
    np.testing.assert_array_equal(image[1, :2], codec.encode(video)[1, :2])
