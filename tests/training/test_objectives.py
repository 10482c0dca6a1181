"""The world loss against numbers worked out by hand, and the mixture it is trained on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.diffusion.flow import unshift_sigma
from lingbot_jax.models import params
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.codec import LinearCodec
from lingbot_jax.models.config import LinearCodecConfig
from lingbot_jax.training.config import FlowConfig, TaskConfig
from lingbot_jax.training.objectives import Constants
from lingbot_jax.training.objectives.world import draw_known, world_loss
from lingbot_jax.worlds.clips import Encoded
from lingbot_jax.worlds.condition import Camera, Conditioning, conditioning_frames
from lingbot_jax.worlds.world import template
from tests.training import micro

pytestmark = pytest.mark.long

KEY = jax.random.key(0)
NULL = -jnp.ones((1, micro.NETWORK.text_len, micro.NETWORK.text_dim))


class Stub:
    """In place of a model: answers with the true velocity of a clip it knows, plus an error made by hand."""

    config = micro.NETWORK

    def __init__(self, clean, error):
        self.clean, self.error = clean, error

    def __call__(self, latents, timestep, condition, *, attend):
        self.sigma, self.condition = np.asarray(timestep) / 1000, condition
        sigma = (timestep / 1000)[..., None, None, None]
        # x_s = (1 - s) x0 + s n, so the velocity n - x0 is (x_s - x0) / s.
        return (latents - self.clean) / sigma + self.error(sigma)


def clips(batch: int, t: int = 3, h: int = 1, w: int = 1) -> Encoded:
    text = jnp.ones((batch, micro.NETWORK.text_len, micro.NETWORK.text_dim))
    camera = Camera(
        jnp.broadcast_to(jnp.eye(4), (batch, t, 4, 4)), jnp.full((batch, 1, 4), 4.0), jnp.ones((batch, t, 4))
    )
    conditioning = Conditioning(jnp.zeros((batch, t, h, w, 4)), jnp.zeros((batch, t, h, w, 8)))
    return Encoded(jnp.full((batch, t, h, w, 8), 0.5), text, camera, conditioning)


def loss_of(error, flow=None, network="world", tasks=None, batch=64, boundary=0.9):
    world = micro.world_config(*{"world": ("world",)}.get(network, ("high", "low")), boundary=boundary)
    config = micro.config(
        micro.ROOT,
        "unused",
        world=world,
        flow=flow or FlowConfig(),
        tasks=tasks or TaskConfig(),
        curriculum=(),
    )
    made = clips(batch)
    stub = Stub(made.latents, error)
    loss, metrics = world_loss(config, network, {network: stub}, made, Constants(NULL, None), KEY, Attend())
    return stub, float(loss), {name: float(m.sum) / float(m.count) for name, m in metrics.items()}


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
@pytest.mark.parametrize("network", ["world", "high", "low"])
def test_noise_levels_are_shifted_and_stay_in_the_network_s_region(network, shift):
    n = 4000
    stub, _, _ = loss_of(lambda sigma: 0.0, FlowConfig(shift=shift), network, batch=n)
    lo, hi = {"world": (0.0, 1.0), "high": (0.9, 1.0), "low": (0.0, 0.9)}[network]
    levels = np.sort(stub.sigma[:, 0].astype(np.float64))
    assert lo - 1e-6 <= levels[0] and levels[-1] <= hi + 1e-6
    # Kolmogorov-Smirnov at 1e-4: undoing the shift must leave a uniform distribution between the bounds' images.
    u_lo, u_hi = unshift_sigma(lo, shift), unshift_sigma(hi, shift)
    uniform = (levels / (shift - (shift - 1) * levels) - u_lo) / (u_hi - u_lo)
    assert np.abs(uniform - (np.arange(n) + 0.5) / n).max() < 2.2 / np.sqrt(n)


def test_tasks_are_mixed_as_configured():
    tasks, n = TaskConfig(continuation=0.3, max_conditioning_frames=5), 40000
    share = np.bincount(draw_known(0, 0, n, tasks), minlength=6) / n
    np.testing.assert_allclose(share, [0, 0.7, *[0.3 / 4] * 4], atol=0.01)
    assert set(draw_known(0, 1, 100, TaskConfig(continuation=0.0))) == {1}
    assert set(draw_known(0, 1, 1000, TaskConfig(continuation=1.0))) == {2, 3, 4, 5}
    assert (draw_known(0, 1, 64, tasks) != draw_known(0, 2, 64, tasks)).any(), "every step draws anew"


def test_conditions_are_dropped_whole_and_as_often_as_configured():
    n = 4000
    tasks = TaskConfig(text_dropout=0.1, control_dropout=0.25)
    stub, _, _ = loss_of(lambda sigma: 0.0, tasks=tasks, batch=n)
    text = np.asarray(stub.condition.text).reshape(n, -1)
    control = np.asarray(stub.condition.control).reshape(n, -1)
    nothing = (text == -1).all(1)
    assert (nothing | (text == 1).all(1)).all(), "a sample keeps all of its text, or has that of nothing"
    blind = (control == 0).all(1)
    assert (blind | (control == control[~blind][0]).all(1)).all()
    np.testing.assert_allclose(nothing.mean(), 0.1, atol=0.02)
    np.testing.assert_allclose(blind.mean(), 0.25, atol=0.02)
    np.testing.assert_allclose((nothing & blind).mean(), 0.1 * 0.25, atol=0.01)  # drawn independently


def published_mask(known: int, latent_frames: int) -> np.ndarray:
    """[t 4] as the published image-to-video code builds it: pixel frames, the first one four times, in fours."""
    frames = 4 * (latent_frames - 1) + 1
    mask = np.zeros(frames)
    mask[: 4 * (known - 1) + 1] = 1
    return np.concatenate([np.repeat(mask[:1], 4), mask[1:]]).reshape(latent_frames, 4)


def test_mask_channels_are_the_published_ones():
    config = LinearCodecConfig(channels=3, strides=(4, 2, 2))
    arrays = {"basis": jnp.eye(12 * 4)[:, :3], "mean": jnp.zeros(48), "scale": jnp.ones(())}
    codec = params.with_arrays(template(config), arrays)
    assert isinstance(codec, LinearCodec)
    video = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, 13, 4, 4, 3)), jnp.float32)
    made = conditioning_frames(codec, video, jnp.array([1, 2, 4]))
    assert made.mask.shape == (3, 4, 2, 2, 4)
    for sample, known in enumerate((1, 2, 4)):
        want = published_mask(known, 4)[:, None, None]
        np.testing.assert_array_equal(made.mask[sample], np.broadcast_to(want, made.mask.shape[1:]))
    # Behind the known frames the conditioning latent is that of mid-grey, and nothing of the clip is in it.
    grey = codec.encode(jnp.zeros_like(video))
    np.testing.assert_array_equal(made.image[0, 1:], grey[0, 1:])
    np.testing.assert_array_equal(made.image[1, :2], codec.encode(video)[1, :2])
    # Later frames of play are as the last of those encoded at the start.
    assert (np.asarray(made.at(jnp.array([0, 9])).image[:, 1]) == np.asarray(made.image[:, 3])).all()


def test_a_known_prefix_alone_gives_the_same_conditioning():
    """Sampling has the known frames only; training has the whole clip."""
    config = dataclasses.replace(LinearCodecConfig(channels=3), strides=(4, 2, 2))
    rng = np.random.default_rng(0)
    arrays = {"basis": jnp.float32(rng.normal(size=(48, 3))), "mean": jnp.zeros(48), "scale": jnp.ones(())}
    codec = params.with_arrays(template(config), arrays)
    video = jnp.asarray(rng.uniform(-1, 1, (1, 13, 4, 4, 3)), jnp.float32)
    whole = conditioning_frames(codec, video, jnp.array([2]))
    prefix = conditioning_frames(codec, video[:, :5], jnp.array([2]), 4)
    jax.tree.map(np.testing.assert_array_equal, whole, prefix)
