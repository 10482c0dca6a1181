"""The convolutional codec: principal components of patches, and a decoder that sees across their borders.

Patches alone draw edges that break where patches meet. The encoder stays linear (a world can be trained on its
latents before the decoder is), and the decoder sees the latents around and the latent before:

    encode   patch -> principal components, each divided by a fixed number
    decode   (latent, latent before) -> one 3x3 convolution to patches, fitted in closed form
                                     -> 3x3 convolutions over squares of 2 x 2 pixels, which mend it

It is causal with one latent frame of memory, so a stream decoded chunk by chunk equals the whole.
`experiments.fit_codec` fits the linear parts (`fit_conv`) and trains the networks (`reconstruction_loss`).
"""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from lingbot_jax.axes import KERNEL
from lingbot_jax.models import params
from lingbot_jax.models.codec import Stream, first_frame_alone, fit_linear, patches_of
from lingbot_jax.models.config import ConvCodecConfig, LinearCodecConfig
from lingbot_jax.models.params import ones, param, zeros
from lingbot_jax.models.vae_layers import Linear, RMSNorm, SpatialConv, conv2d, matmul

LINEAR = ("basis", "mean", "std", "context", "context_bias")  # parameters in closed form, not trained
_RIDGE = 1e-4  # of the mean variance of a feature
_RESIDUAL = (
    0.05  # of pixels in [-1, 1]: the size of what the linear decoder leaves over, for the networks to add
)
_SAME = ((1, 1), (1, 1))
Latents = Float[Array, "b t h w c"]
Video = Float[Array, "b f H W 3"]
Batches = Callable[[], Iterable[Float[Array | np.ndarray, "b f H W 3"]]]


class Block(nnx.Module):
    """x + linear(gelu(conv(norm(x))))."""

    def __init__(self, width: int, key: jax.Array):
        keys = jax.random.split(key)
        self.norm = RMSNorm(width, key)
        self.conv = SpatialConv(width, width, keys[0])
        self.out = Linear(width, width, keys[1])

    def __call__(self, x: Latents) -> Latents:
        return x + self.out(jax.nn.gelu(self.conv(self.norm(x))))


class ConvCodec(nnx.Module):
    """See the module docstring, and `codec.Codec` for the interface.

    Attributes:
      basis: `i c`, orthonormal columns, and mean: `i`, of patches. std: `c`, what components are divided by.
      context: `3 3 2c i` and context_bias: `i`, the linear decoder. phase: where in its patch a square is.
    """

    def __init__(self, config: ConvCodecConfig, key: jax.Array):
        st, sh, sw = config.strides
        features, channels, width = 3 * st * sh * sw, config.channels, config.width
        keys = iter(jax.random.split(key, 4 + config.blocks))
        self.config = config
        self.basis = param(next(keys), (features, channels), (None, None), jax.nn.initializers.orthogonal())
        self.mean = param(key, (features,), (None,), zeros)
        self.std = param(key, (channels,), (None,), ones)
        self.context = param(key, (3, 3, 2 * channels, features), (KERNEL, KERNEL, None, None), zeros)
        self.context_bias = param(key, (features,), (None,), zeros)
        self.inputs = SpatialConv(12 * st, width, next(keys))
        self.phase = param(next(keys), (sh // 2, sw // 2, width), (None, None, None), params.normal(0.02))
        self.blocks = nnx.List([Block(width, next(keys)) for _ in range(config.blocks)])
        self.norm = RMSNorm(width, key)
        self.outputs = Linear(width, 12 * st, next(keys))

    def encode(self, video: Video) -> Latents:
        return self.encode_chunk(video, (), first=True)[0]

    def init_encode_stream(self, batch: int, height: int, width: int) -> Stream:
        return ()  # a patch is encoded alone

    def encode_chunk(self, video: Video, stream: Stream, *, first: bool) -> tuple[Latents, Stream]:
        patches = patches_of(video, self.config, first)
        return matmul(patches - self.mean[...], self.basis[...]) / self.std[...], stream

    def decode(self, latents: Latents) -> Video:
        batch, _, height, width, _ = latents.shape
        return self.decode_chunk(latents, self.init_stream(batch, height, width), first=True)[0]

    def init_stream(self, batch: int, height: int, width: int) -> Stream:
        """The latent before the first chunk, which does not look at it."""
        return jnp.zeros((batch, 1, height, width, self.config.channels))

    def decode_chunk(self, latents: Latents, stream: Stream, *, first: bool) -> tuple[Video, Stream]:
        video = self.decode_raw(latents, stream, first=first)
        return jnp.clip(video, -1.0, 1.0), latents[:, -1:].astype(jnp.float32)

    def decode_raw(self, latents: Latents, stream: Stream, *, first: bool) -> Video:
        """The video of `decode_chunk` before it is clipped: what training compares."""
        st, sh, sw = self.config.strides
        drawn = conv2d(with_before(latents, stream, first), self.context[...], _SAME) + self.context_bias[...]
        squares = "b t h w (s p y q x c) -> b t (h p) (w q) (s y x c)"  # of 2 x 2 pixels
        drawn = rearrange(drawn, squares, s=st, p=sh // 2, y=2, q=sw // 2, x=2, c=3)
        x = self.inputs(drawn) + jnp.tile(self.phase[...], (*latents.shape[2:4], 1))
        for block in self.blocks:
            x = block(x)
        drawn = drawn + _RESIDUAL * self.outputs(self.norm(x))
        groups = rearrange(drawn, "b t h w (s y x c) -> b t s (h y) (w x) c", s=st, y=2, x=2, c=3)
        return first_frame_alone(groups, first)


def with_before(latents: Latents, stream: Stream, first: bool) -> Float[Array, "b t h w e"]:
    """Each latent frame beside the one before it, e = 2c; the first of a video beside itself."""
    before = jnp.concatenate([latents[:, :1] if first else stream, latents[:, :-1]], axis=1)
    return jnp.concatenate([latents, before], axis=-1)


def fit_conv(batches: Batches, config: ConvCodecConfig, key: jax.Array) -> ConvCodec:
    """The codec with its linear parts fitted, and networks that add nothing yet.

    Components are divided by the power `config.whitening` of their standard deviation and by one number for all, so
    that the mean of their variances is 1: at 0 squared error in latents is squared error in pixels, at 1 every
    component counts alike.

    Args:
      batches: gives the batches of video anew, twice.

    Raises:
      ConfigError: there was no batch.
    """
    linear = fit_linear(batches(), LinearCodecConfig(channels=config.channels, strides=config.strides))
    fresh = ConvCodec(config, key)
    arrays = params.arrays_of(fresh) | {"basis": linear.basis[...], "mean": linear.mean[...]}
    arrays["outputs.kernel"] = jnp.zeros_like(arrays["outputs.kernel"])
    codec = params.with_arrays(fresh, arrays)

    moments = jax.jit(lambda video: _moments(codec, video))
    squares, products, count = 0.0, 0.0, 0
    for video in batches():
        xx, xy, rows = moments(jnp.asarray(video))
        squares, products, count = squares + np.float64(xx), products + np.float64(xy), count + int(rows)
    own = slice(
        4 * 2 * config.channels, (4 * 2 + 1) * config.channels
    )  # of the middle tap, the latent itself
    spread = np.sqrt(np.diag(squares)[own] / count)
    std = spread**config.whitening
    std *= np.sqrt(np.mean((spread / std) ** 2))
    ridge = _RIDGE * np.trace(squares) / len(squares)
    kernel = np.linalg.solve(squares + ridge * np.eye(len(squares)), products)
    context = kernel[:-1].reshape(3, 3, 2, config.channels, -1) * std[:, None]
    as32 = lambda a: jnp.asarray(a, jnp.float32)
    fitted = {
        "std": as32(std),
        "context": as32(context.reshape(codec.context.shape)),
        "context_bias": as32(kernel[-1]),
    }
    return params.with_arrays(codec, arrays | fitted)


def _moments(codec: ConvCodec, video: Video) -> tuple[Float[Array, "n n"], Float[Array, "n i"], int]:
    """Sums of products of what the linear decoder sees (n, the last is 1) with itself and with patches; rows."""
    patches = patches_of(video, codec.config)
    latents = codec.encode(video)  # std is still 1
    height, width = latents.shape[2:4]
    seen = jnp.pad(with_before(latents, (), True), ((0, 0), (0, 0), *_SAME, (0, 0)))
    taps = [seen[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    x = jnp.concatenate([*taps, jnp.ones_like(taps[0][..., :1])], axis=-1)
    x, y = x.reshape(-1, x.shape[-1]), patches.reshape(-1, patches.shape[-1])
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return product(x.T, x), product(x.T, y), len(x)


def reconstruction_loss(codec: ConvCodec, video: Video, key: jax.Array, noise: float) -> Float[Array, ""]:
    """L1 of pixels and of their differences to the right and below (edges), and squared error.

    Args:
      noise: standard deviation of what is added to the latents, so that the decoder bears what a sampler leaves.
    """
    latents = codec.encode(video)
    latents = latents + noise * jax.random.normal(key, latents.shape)
    error = codec.decode_raw(latents, (), first=True) - video
    edges = jnp.abs(jnp.diff(error, axis=2)).mean() + jnp.abs(jnp.diff(error, axis=3)).mean()
    return jnp.abs(error).mean() + 0.5 * edges + 2.0 * jnp.square(error).mean()
