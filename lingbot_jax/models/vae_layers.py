"""Layers of the Wan 2.1 VAE, causal in time, with their stream caches as explicit values.

Every layer is called as `y, cache = layer(x, cache, opening)` with `x: b t h w c`, the frames of one latent
frame (t is 1 at latent rate, up to 4 at pixel rate). `cache` holds the last frames of a layer's input that
the next call needs: zeros before the stream, and of one structure always.

The published network sends the very first video frame through alone, with t = 1 everywhere. Here it comes
as the last of a group of 4 whose other frames are filling, and `opening` (a scalar bool, or None for
"statically not the opening") says so: filling is set to zero wherever a layer looks back in time, which is
exactly the zero padding the lone frame would see. So one program handles both kinds of call.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from lingbot_jax import axes as ax
from lingbot_jax.models import params

Opening = Bool[Array, ""] | None
Frames = Float[Array, "b t h w c"]
Wider = Float[Array, "b t h w o"]  # the same frames with other channels
Resized = Float[Array, "b u y x o"]  # other sizes and rates
Past = Float[Array, "b 2 h w c"]  # what a causal convolution remembers of its input
Caches = Any  # nested caches of several layers


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """Of a codec's products: three passes of a TPU for float32, which the published code computes in TF32; one would
    round its operands to bfloat16."""
    return jax.lax.Precision.HIGH if dtype == jnp.float32 else None


def matmul(x: Float[Array, "*rest c"], kernel: Float[Array, "c o"]) -> Float[Array, "*rest o"]:
    """x @ kernel, in x's dtype."""
    return jnp.matmul(x, kernel.astype(x.dtype), precision=precision_of(x.dtype))


def without_filling(x: Frames, opening: Opening) -> Frames:
    """Zeroes all frames but the last in the opening call."""
    frames = x.shape[1]
    if opening is None or frames == 1:
        return x
    filling = opening & (jnp.arange(frames) < frames - 1)
    return jnp.where(filling[:, None, None, None], 0, x)


def conv2d(
    x: Frames, kernel: Float[Array, "p q c o"], padding: tuple[tuple[int, int], ...], stride: int = 1
) -> Float[Array, "b t y x o"]:
    """The same 2D convolution of every frame, in x's dtype."""
    batch, frames, *image = x.shape
    y = jax.lax.conv_general_dilated(
        x.reshape(batch * frames, *image),
        kernel.astype(x.dtype),
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision_of(x.dtype),
    )
    return y.reshape(batch, frames, *y.shape[1:])


class RMSNorm(nnx.Module):
    """Scales each pixel's channels to unit root mean square, in float32; the norm is at least 1e-12."""

    def __init__(self, channels: int, key: jax.Array):
        self.scale = params.param(key, (channels,), (ax.NORM,), params.ones)

    def __call__(self, x: Frames) -> Frames:
        wide = x.astype(jnp.float32)
        norm = jnp.maximum(jnp.sqrt(jnp.sum(wide**2, -1, keepdims=True)), 1e-12)
        return (wide / norm * (x.shape[-1] ** 0.5 * self.scale)).astype(x.dtype)


class Linear(nnx.Module):
    """A 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, key: jax.Array):
        self.kernel = params.param(key, (inputs, outputs), (ax.INPUT, ax.OUTPUT))
        self.bias = params.param(key, (outputs,), (ax.OUTPUT,), params.zeros)

    def __call__(self, x: Float[Array, "*rest c"]) -> Float[Array, "*rest o"]:
        return matmul(x, self.kernel[...]) + self.bias.astype(x.dtype)


class SpatialConv(nnx.Module):
    """A 3x3 convolution of every frame. Stride 2 pads at the bottom and the right only, as published."""

    def __init__(self, inputs: int, outputs: int, key: jax.Array, stride: int = 1):
        axes = (ax.KERNEL, ax.KERNEL, ax.INPUT, ax.OUTPUT)
        self.kernel = params.param(key, (3, 3, inputs, outputs), axes, _conv_init)
        self.bias = params.param(key, (outputs,), (ax.OUTPUT,), params.zeros)
        self.stride = stride

    def __call__(self, x: Frames) -> Float[Array, "b t y x o"]:
        padding = ((1, 1), (1, 1)) if self.stride == 1 else ((0, 1), (0, 1))
        return conv2d(x, self.kernel[...], padding, self.stride) + self.bias.astype(x.dtype)


class CausalConv(nnx.Module):
    """A convolution over 3 frames (this one and two before) and `window` x `window` pixels.

    Computed as a sum of three 2D convolutions: XLA's 3D convolution on the CPU runs at 6 to 90 GFLOP/s
    where this runs at 30 to 190 (dims 8 to 192, two cores).
    """

    def __init__(self, inputs: int, outputs: int, key: jax.Array, window: int = 3):
        axes = (ax.KERNEL, ax.KERNEL, ax.KERNEL, ax.INPUT, ax.OUTPUT)
        self.kernel = params.param(key, (3, window, window, inputs, outputs), axes, _conv_init)
        self.bias = params.param(key, (outputs,), (ax.OUTPUT,), params.zeros)

    def stream(self, batch: int, height: int, width: int, dtype: jnp.dtype) -> Past:
        """The cache before the first frame: two frames of zeros."""
        return jnp.zeros((batch, 2, height, width, self.kernel.shape[-2]), dtype)

    def __call__(self, x: Frames, cache: Past, opening: Opening) -> tuple[Wider, Past]:
        frames = x.shape[1]
        seen = jnp.concatenate([cache, without_filling(x, opening)], axis=1)
        pad = (self.kernel.shape[1] - 1) // 2
        padding = ((pad, pad), (pad, pad))
        taps = [conv2d(seen[:, tap : tap + frames], self.kernel[tap], padding) for tap in range(3)]
        return sum(taps) + self.bias.astype(x.dtype), seen[:, -2:]


class Residual(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a linear shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.norm1 = RMSNorm(inputs, key)
        self.conv1 = CausalConv(inputs, outputs, keys[0])
        self.norm2 = RMSNorm(outputs, key)
        self.conv2 = CausalConv(outputs, outputs, keys[1])
        if inputs != outputs:
            self.shortcut = Linear(inputs, outputs, keys[2])

    def stream(self, batch: int, height: int, width: int, dtype: jnp.dtype) -> Caches:
        size = (batch, height, width, dtype)
        return self.conv1.stream(*size), self.conv2.stream(*size)

    def __call__(self, x: Frames, cache: Caches, opening: Opening) -> tuple[Wider, Caches]:
        y, cache1 = self.conv1(jax.nn.silu(self.norm1(x)), cache[0], opening)
        y, cache2 = self.conv2(jax.nn.silu(self.norm2(y)), cache[1], opening)
        return y + (self.shortcut(x) if hasattr(self, "shortcut") else x), (cache1, cache2)


class Attention(nnx.Module):
    """One head of self-attention among the pixels of a frame, with a residual connection."""

    def __init__(self, channels: int, key: jax.Array):
        keys = jax.random.split(key)
        self.norm = RMSNorm(channels, key)
        self.qkv = Linear(channels, 3 * channels, keys[0])
        self.out = Linear(channels, channels, keys[1])

    def __call__(self, x: Frames) -> Frames:
        batch, frames, height, width, channels = x.shape
        pixels = self.qkv(self.norm(x)).reshape(batch * frames, height * width, 3 * channels)
        q, k, v = jnp.split(pixels, 3, axis=-1)
        product = functools.partial(jnp.einsum, precision=precision_of(x.dtype))
        logits = product("bnc,bmc->bnm", q, k, preferred_element_type=jnp.float32) * channels**-0.5
        mixed = product("bnm,bmc->bnc", jax.nn.softmax(logits).astype(x.dtype), v)
        return x + self.out(mixed.reshape(x.shape))


class Middle(nnx.Module):
    """Residual block, attention, residual block, at latent resolution."""

    def __init__(self, channels: int, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.before = Residual(channels, channels, keys[0])
        self.attention = Attention(channels, keys[1])
        self.after = Residual(channels, channels, keys[2])

    def stream(self, batch: int, height: int, width: int, dtype: jnp.dtype) -> Caches:
        size = (batch, height, width, dtype)
        return self.before.stream(*size), self.after.stream(*size)

    def __call__(self, x: Frames, cache: Caches, opening: Opening) -> tuple[Frames, Caches]:
        x, before = self.before(x, cache[0], opening)
        x, after = self.after(self.attention(x), cache[1], opening)
        return x, (before, after)


class Downsample(nnx.Module):
    """Halves height and width, and if `time` also the frame rate."""

    def __init__(self, channels: int, key: jax.Array, time: bool):
        keys = jax.random.split(key)
        self.space = SpatialConv(channels, channels, keys[0], stride=2)
        if time:
            self.time = CausalConv(channels, channels, keys[1], window=1)

    def stream(self, batch: int, height: int, width: int, dtype: jnp.dtype) -> Caches:
        """Strided windows of 3 overlap by one frame only, so one frame is remembered."""
        size = (batch, height // 2, width // 2, dtype)
        return self.time.stream(*size)[:, :1] if hasattr(self, "time") else ()

    def __call__(self, x: Frames, cache: Caches, opening: Opening) -> tuple[Resized, Caches]:
        x = self.space(x)
        if not hasattr(self, "time"):
            return x, cache
        seen = jnp.concatenate([cache, x], axis=1)
        frames, kernel = x.shape[1], self.time.kernel[:, 0, 0]
        y = sum(matmul(seen[:, tap : tap + frames : 2], kernel[tap]) for tap in range(3))
        y = y + self.time.bias.astype(x.dtype)
        if opening is not None:
            y = jnp.where(opening, x[:, 1::2], y)  # the lone first frame passes through unchanged
        return y, seen[:, -1:]


class Upsample(nnx.Module):
    """Doubles height and width (nearest, then a convolution to half the channels), and if `time` the rate."""

    def __init__(self, channels: int, key: jax.Array, time: bool):
        keys = jax.random.split(key)
        self.space = SpatialConv(channels, channels // 2, keys[0])
        if time:
            self.time = CausalConv(channels, 2 * channels, keys[1], window=1)

    def stream(self, batch: int, height: int, width: int, dtype: jnp.dtype) -> Caches:
        return self.time.stream(batch, height, width, dtype) if hasattr(self, "time") else ()

    def __call__(self, x: Frames, cache: Caches, opening: Opening) -> tuple[Resized, Caches]:
        if hasattr(self, "time"):
            batch, frames, height, width, channels = x.shape
            y, later = self.time(x, cache, opening)
            y = y.reshape(batch, frames, height, width, 2, channels)
            if opening is not None:
                # The lone first frame passes through unchanged, and its successors do not see it here.
                y = jnp.where(opening, x[..., None, :], y)
                later = jnp.where(opening, cache, later)
            x = jnp.moveaxis(y, 4, 2).reshape(batch, 2 * frames, height, width, channels)
            cache = later
        wide = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return self.space(wide), cache


def _conv_init(key: jax.Array, shape: tuple[int, ...], dtype) -> Array:
    """Variance 1 / fan-in, with all taps counted."""
    fan_in = 1
    for size in shape[:-1]:
        fan_in *= size
    return jax.random.normal(key, shape, dtype) * fan_in**-0.5
