"""Rays and the camera / action embedding against closed forms; the device path against the host path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.control import keyboard, plucker, poses
from lingbot_jax.control.plucker import CONTROL_CHANNELS

K = np.array([20.0, 24.0, 16.5, 7.0])  # of a 16 x 32 image
SIZE = (16, 32)


def clip(text="wl-4,wi-4,d-3,none-1"):
    keys = keyboard.parse(text)
    return keyboard.integrate(keys), keys


def test_rays_meet_the_pixel_they_came_from():
    c2w, _ = clip()
    rays = plucker.rays(c2w, K[None], *SIZE)
    assert rays.shape == (13, *SIZE, 6) and rays.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rays[..., 3:], axis=-1), 1, atol=1e-6)
    # Project a point 3 units along each ray back into its image, in float64 with the inverse pose.
    point = rays[..., :3].astype(np.float64) + 3 * rays[..., 3:]
    w2c = np.linalg.inv(c2w)[:, None, None]
    seen = (w2c[..., :3, :3] @ point[..., None])[..., 0] + w2c[..., :3, 3]
    np.testing.assert_array_less(0, seen[..., 2])
    x = K[0] * seen[..., 0] / seen[..., 2] + K[2]
    y = K[1] * seen[..., 1] / seen[..., 2] + K[3]
    np.testing.assert_allclose(x, np.broadcast_to(np.arange(32) + 0.5, x.shape), atol=1e-4)
    np.testing.assert_allclose(y, np.broadcast_to(np.arange(16)[:, None] + 0.5, y.shape), atol=1e-4)
    np.testing.assert_array_equal(rays[:, 3, 5, :3], c2w[:, :3, 3].astype(np.float32))


def test_each_frame_may_have_its_own_intrinsics():
    c2w, _ = clip()
    both = np.stack([K, 2 * K])
    ours = plucker.rays(c2w[:2], both, *SIZE)
    for i in range(2):
        np.testing.assert_array_equal(ours[i], plucker.rays(c2w[i : i + 1], both[i : i + 1], *SIZE)[0])


@pytest.mark.parametrize("stride", [1, 2, 8])
def test_channel_order_of_space_to_depth(stride):
    pixels = np.random.default_rng(0).standard_normal((2, 16, 24, 3))
    embedded = plucker.space_to_depth(pixels, stride)
    assert embedded.shape == (2, 16 // stride, 24 // stride, 3 * stride**2)
    for i, j, row, col, c in [(0, 0, 0, 0, 0), (1, 2, stride - 1, 0, 2), (1, 1, 0, stride - 1, 1)]:
        channel = c * stride**2 + stride * row + col
        assert embedded[1, i, j, channel] == pixels[1, i * stride + row, j * stride + col, c]


@pytest.mark.parametrize("mode", plucker.MODES)
def test_modes_hold_what_the_table_says_on_host_and_device(mode):
    c2w, keys = clip()
    deltas = poses.relative(poses.resample(c2w, 4), "previous", "max_norm")
    actions = None if mode == "cam" else plucker.latent_keys(keys[:, :4])
    ours = plucker.control(deltas, K[None], actions, mode, *SIZE, 8)
    assert ours.shape == (4, 2, 4, 64 * CONTROL_CHANNELS[mode]) and ours.dtype == np.float32

    rays = plucker.space_to_depth(plucker.rays(deltas, K[None], *SIZE), 8)
    parts = {"cam": (0, 384), "act": (192, 384), "cam_act": (0, 384)}[mode]
    np.testing.assert_array_equal(ours[..., : parts[1] - parts[0]], rays[..., parts[0] : parts[1]])
    if actions is not None:
        for key in range(4):
            channels = ours[..., parts[1] - parts[0] + 64 * key :][..., :64]
            np.testing.assert_array_equal(
                channels, np.broadcast_to(actions[:, None, None, [key]], channels.shape)
            )

    # On the device: jitted, with a batch, equal to the host within float32 rounding.
    batch = [None if x is None else jnp.asarray(x, jnp.float32)[None] for x in (deltas, K[None], actions)]
    device = jax.jit(lambda c, k, h: plucker.control(c, k, h, mode, *SIZE, 8))(*batch)
    np.testing.assert_allclose(np.asarray(device)[0], ours, atol=1e-6)


def test_latent_keys_are_the_part_of_the_frames():
    keys = keyboard.parse("w-4,w-2,d-2,wd-1,none-3")
    ours = plucker.latent_keys(keys[:, :4])
    np.testing.assert_array_equal(ours, [[0, 0, 0, 0], [1, 0, 0, 0], [0.5, 0, 0, 0.5], [0.25, 0, 0, 0.25]])
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(plucker.latent_keys(jnp.asarray(keys))[:, :4], ours)
    np.testing.assert_array_equal(plucker.latent_keys(keys, temporal_stride=1), keys)


def test_held_keys_and_latent_deltas_agree():
    """A latent frame's fraction of W times 4 steps is the distance to the previous latent pose."""
    keys = keyboard.parse("w-4,w-2,none-2,w-1,none-3")
    latent = poses.resample(keyboard.integrate(keys), 4)
    moved = poses.relative(latent, "previous", 4 * keyboard.STEP)[:, 2, 3]
    np.testing.assert_allclose(moved, plucker.latent_keys(keys)[:, 0], atol=1e-12)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda c, k: plucker.latent_keys(k[:11]), "frames = 11: must be 4n + 1"),
        (lambda c, k: plucker.control(c, K[None], c[:, 0], "cam", *SIZE, 8), "carries no keys"),
        (lambda c, k: plucker.control(c, K[None], None, "act", *SIZE, 8), "no keys given"),
    ],
)
def test_refusals(call, said):
    with pytest.raises(ConfigError) as error:
        call(*clip())
    assert said in str(error.value) and "\n" not in str(error.value)
