"""The camera / action embedding: what camera and keys do, as channels of a latent pixel (paper section 3.3.2).

    mode      channels per pixel                            C
    cam       ray origin 3, ray direction 3                 6   published `cam` checkpoints
    act       ray direction 3, W A S D 4                    7   published `act` checkpoints
    cam_act   ray origin 3, ray direction 3, W A S D 4     10   worlds trained from scratch

A latent pixel covers stride x stride pixels; `space_to_depth` puts them into channels, index c*stride^2 +
stride*row + col. The same code runs on the host with NumPy arrays and on the device (also traced) with JAX arrays, in
float32: bring poses to `poses.relative` form first, in float64, so that nothing large is left to round.
"""

from typing import Literal

import jax
import numpy as np
from jaxtyping import Float, Float32, Shaped

from lingbot_jax.config import ConfigError, require

Array = np.ndarray | jax.Array
Control = Literal["none", "cam", "act", "cam_act"]
# Channels of the control tensor per pixel: ray origin 3, ray direction 3, W A S D 4 (paper section 3.3.2).
CONTROL_CHANNELS: dict[str, int] = {"none": 0, "cam": 6, "act": 7, "cam_act": 10}
MODES = tuple(mode for mode in CONTROL_CHANNELS if mode != "none")


def rays(
    c2w: Float[Array, "*b t 4 4"], intrinsics: Float[Array, "*#b #t 4"], height: int, width: int
) -> Float32[Array, "*b t height width 6"]:
    """Origin and unit direction of the ray through every pixel centre (+0.5), in world axes.

    Args:
      c2w: camera-to-world. intrinsics: fx, fy, cx, cy in pixels of a height x width image.
    """
    xp = c2w.__array_namespace__()
    c2w = c2w.astype(xp.float32)
    fx, fy, cx, cy = (intrinsics.astype(xp.float32)[..., i, None, None] for i in range(4))
    x = (xp.arange(width, dtype=xp.float32) + 0.5 - cx) / fx
    y = (xp.arange(height, dtype=xp.float32)[:, None] + 0.5 - cy) / fy
    shape = (*c2w.shape[:-2], height, width)
    x, y = xp.broadcast_to(x, shape), xp.broadcast_to(y, shape)
    camera = xp.stack([x, y, xp.ones_like(x)], axis=-1)
    camera = camera / xp.sqrt(x * x + y * y + 1.0)[..., None]
    # Written out: three multiplications a ray are exact in float32 on every device, matmul units may not be.
    rotation = c2w[..., None, None, :3, :3]
    direction = sum(camera[..., i, None] * rotation[..., i] for i in range(3))
    origin = xp.broadcast_to(c2w[..., None, None, :3, 3], (*shape, 3))
    return xp.concatenate([origin, direction], axis=-1)


def space_to_depth(pixels: Float[Array, "*b H W c"], stride: int) -> Float[Array, "*b h w o"]:
    """Moves each stride x stride square of pixels into channels, index c*stride^2 + stride*row + col."""
    xp = pixels.__array_namespace__()
    *batch, height, width, c = pixels.shape
    require(height % stride == 0, "height", height, f"must be a multiple of the stride {stride}")
    require(width % stride == 0, "width", width, f"must be a multiple of the stride {stride}")
    x = pixels.reshape(*batch, height // stride, stride, width // stride, stride, c)
    n = len(batch)
    x = xp.transpose(x, (*range(n), n, n + 2, n + 4, n + 1, n + 3))
    return x.reshape(*batch, height // stride, width // stride, c * stride**2)


def control(
    c2w: Float[Array, "*b t 4 4"],
    intrinsics: Float[Array, "*#b #t 4"],
    actions: Float[Array, "*b t 4"] | None,
    mode: str,
    height: int,
    width: int,
    stride: int,
) -> Float32[Array, "*b t h w o"]:
    """The camera / action embedding of latent frames; all arrays NumPy, or all JAX.

    Args:
      c2w: relative poses at latent frames (`poses.resample`, then `poses.relative`).
      intrinsics: fx, fy, cx, cy in pixels of a height x width image; one row for all frames has t = 1.
      actions: W A S D at latent frames in [0, 1] (`latent_keys`); None exactly when the mode carries no keys.
      mode: one of MODES. height, width: pixels, multiples of stride. stride: pixels per latent pixel.
    """
    require(mode in MODES, "control", mode, f"must be one of {', '.join(MODES)}")
    with_keys = mode != "cam"
    if with_keys != (actions is not None):
        have, need = ("no keys", "needs") if actions is None else ("keys", "carries no")
        raise ConfigError(f"control = {mode!r}: {have} given, but this mode {need} keys")
    xp = c2w.__array_namespace__()
    pixels = rays(c2w, intrinsics, height, width)
    embedding = space_to_depth(pixels[..., 3:] if mode == "act" else pixels, stride)
    if not with_keys:
        return embedding
    # Actions are equal over the image, so their channels are a repetition: no need to fold pixels.
    actions = xp.repeat(actions.astype(xp.float32), stride**2, axis=-1)[..., None, None, :]
    actions = xp.broadcast_to(actions, (*embedding.shape[:-1], actions.shape[-1]))
    return xp.concatenate([embedding, actions], axis=-1)


def latent_keys(keys: Shaped[Array, "*b f k"], temporal_stride: int = 4) -> Float32[Array, "*b t k"]:
    """How long each key was held in the video frames of a latent frame, in [0, 1].

    The codec joins frames 4i-3 .. 4i into latent frame i, and frame 0 alone into latent 0. Row j of `keys` is
    the transition into frame j, so latent i gets the mean of rows 4i-3 .. 4i: exactly the transitions that
    lead from the pose of latent i-1 to that of latent i. Latent 0 gets row 0.

    Args:
      keys: 0 or 1, f = temporal_stride * n + 1 rows.
    """
    xp = keys.__array_namespace__()
    *batch, f, k = keys.shape
    require(f % temporal_stride == 1 % temporal_stride, "frames", f, f"must be {temporal_stride}n + 1")
    keys = keys.astype(xp.float32)
    groups = keys[..., 1:, :].reshape(*batch, (f - 1) // temporal_stride, temporal_stride, k)
    return xp.concatenate([keys[..., :1, :], groups.mean(axis=-2)], axis=-2)
