"""Latent codecs: one interface, and the linear patch codec that fits in seconds on a CPU.

A codec turns video `b f h w 3` in [-1, 1] into normalised latents `b t hl wl c` and back, causally in time:
the first frame alone, then groups of `stride[0]` frames, so f = st * (t - 1) + 1 and a prefix of the frames
is encoded into a prefix of the latents. The convolutional codec (`conv_codec.py`) and the Wan 2.1 VAE (`vae.py`)
stand behind the same interface.
"""

import math
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float, Shaped

from lingbot_jax.config import ConfigError
from lingbot_jax.models import params
from lingbot_jax.models.config import ConvCodecConfig, LinearCodecConfig, VAEConfig
from lingbot_jax.models.params import ones, param, zeros
from lingbot_jax.models.vae_layers import matmul

Stream = Any  # a pytree of static structure, threaded through encode_chunk or decode_chunk


@runtime_checkable  # the tests check annotations
class Codec(Protocol):
    """What the rest of the system needs of a codec. All methods are pure."""

    config: LinearCodecConfig | ConvCodecConfig | VAEConfig

    def encode(self, video: Float[Array, "b f h w 3"]) -> Float[Array, "b t hl wl c"]:
        """Video in [-1, 1] to normalised latents (about zero mean, unit variance)."""
        ...

    def decode(self, latents: Float[Array, "b t hl wl c"]) -> Float[Array, "b f h w 3"]:
        """Latents to video, clipped to [-1, 1]."""
        ...

    def init_encode_stream(self, batch: int, height: int, width: int) -> Stream:
        """The state before the first chunk of an encode; height and width in pixels."""
        ...

    def encode_chunk(
        self, video: Float[Array, "b f h w 3"], stream: Stream, *, first: bool
    ) -> tuple[Float[Array, "b t hl wl c"], Stream]:
        """Encodes the next frames: whole groups, the first of which is one frame alone where `first` (static)."""
        ...

    def init_stream(self, batch: int, height: int, width: int) -> Stream:
        """The state before the first chunk of a decode; height and width in latent pixels."""
        ...

    def decode_chunk(
        self, latents: Float[Array, "b t hl wl c"], stream: Stream, *, first: bool
    ) -> tuple[Float[Array, "b f h w 3"], Stream]:
        """Decodes the next latent frames; `first` (static): this chunk opens the stream, so that its first
        latent frame is one video frame and not a group."""
        ...


class LinearCodec(nnx.Module):
    """Principal components of space-time patches: latents = (patch - mean) @ basis / scale.

    The first frame is repeated to fill its patch, so that one basis serves stills and motion alike, and an
    image latent means the same as a video latent of a camera at rest.

    Attributes:
      basis: `i c`, orthonormal columns. mean: `i`. scale: scalar; a single scale for all channels keeps the
        latent metric equal to the pixel metric: squared error in latents is squared error in pixels.
    """

    def __init__(self, config: LinearCodecConfig, key: jax.Array):
        features = 3 * math.prod(config.stride)
        self.basis = param(key, (features, config.channels), (None, None), jax.nn.initializers.orthogonal())
        self.mean = param(key, (features,), (None,), zeros)
        self.scale = param(key, (), (), ones)
        self.config = config

    def encode(self, video: Float[Array, "b f h w 3"]) -> Float[Array, "b t hl wl c"]:
        return self.encode_chunk(video, (), first=True)[0]

    def init_encode_stream(self, batch: int, height: int, width: int) -> Stream:
        return ()  # a patch is encoded alone

    def encode_chunk(
        self, video: Float[Array, "b f h w 3"], stream: Stream, *, first: bool
    ) -> tuple[Float[Array, "b t hl wl c"], Stream]:
        patches = patches_of(video, self.config, first)
        return matmul(patches - self.mean[...], self.basis[...]) / self.scale[...], stream

    def decode(self, latents: Float[Array, "b t hl wl c"]) -> Float[Array, "b f h w 3"]:
        return self.decode_chunk(latents, (), first=True)[0]

    def init_stream(self, batch: int, height: int, width: int) -> Stream:
        return ()  # patches do not overlap: nothing to remember

    def decode_chunk(
        self, latents: Float[Array, "b t hl wl c"], stream: Stream, *, first: bool
    ) -> tuple[Float[Array, "b f h w 3"], Stream]:
        st, sh, sw = self.config.stride
        patches = matmul(latents * self.scale[...], self.basis[...].T) + self.mean[...]
        groups = rearrange(patches, "b t h w (s p q c) -> b t s (h p) (w q) c", s=st, p=sh, q=sw, c=3)
        return jnp.clip(first_frame_alone(groups, first), -1.0, 1.0), stream


def first_frame_alone(groups: Float[Array, "b t s h w c"], first: bool) -> Float[Array, "b f h w c"]:
    """Groups of frames as a video; where they open it, the first group stands for one frame, its mean."""
    video = rearrange(groups[:, first:], "b t s h w c -> b (t s) h w c")
    if not first:
        return video
    return jnp.concatenate([groups[:, 0].mean(1, keepdims=True), video], axis=1)


def patches_of(
    video: Float[Array, "b f h w 3"], config: LinearCodecConfig | ConvCodecConfig, first: bool = True
) -> Float[Array, "b t hl wl i"]:
    """Space-time patches; where a video begins (`first`), its first frame is repeated to fill its own."""
    st, sh, sw = config.stride
    if first:
        config.latent_frames(video.shape[1])
        still = repeat(video[:, :1], "b 1 h w c -> b s h w c", s=st)
        video = jnp.concatenate([still, video[:, 1:]], axis=1)
    return rearrange(
        video,
        "b (t s) (h p) (w q) c -> b t h w (s p q c)",
        s=st,
        p=sh,
        q=sw,
    )


def fit_linear(batches: Iterable[Float[np.ndarray, "b f h w 3"]], config: LinearCodecConfig) -> LinearCodec:
    """Fits the linear codec on batches of video in [-1, 1]; moments are summed in float64.

    Raises:
      ConfigError: there was no batch.
    """
    moments = jax.jit(lambda x: (x.sum(0), jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)))
    total, first, second = 0, 0.0, 0.0
    for video in batches:
        x = patches_of(jnp.asarray(video), config).reshape(-1, 3 * int(np.prod(config.stride)))
        s1, s2 = moments(x)
        total, first, second = total + len(x), first + np.float64(s1), second + np.float64(s2)
    if not total:
        raise ConfigError("codec: there are no clips to fit on; collect some first")
    mean = first / total
    covariance = second / total - np.outer(mean, mean)
    variance, vectors = np.linalg.eigh(covariance)
    variance, basis = variance[::-1][: config.channels], vectors[:, ::-1][:, : config.channels]
    scale = np.sqrt(variance.mean())
    as32 = lambda a: jnp.asarray(a, jnp.float32)
    template = params.abstract(lambda key: LinearCodec(config, key))
    return params.with_arrays(template, {"basis": as32(basis), "mean": as32(mean), "scale": as32(scale)})


def to_float(frames: Shaped[Array, "..."] | np.ndarray) -> Float[Array, "..."]:
    """uint8 frames to [-1, 1]; floats pass."""
    frames = jnp.asarray(frames)
    return frames.astype(jnp.float32) / 127.5 - 1.0 if frames.dtype == jnp.uint8 else frames


def to_uint8(video: Float[Array | np.ndarray, "..."]) -> Shaped[Array, "..."]:
    """Video in [-1, 1] to uint8, rounded to nearest."""
    return jnp.round((jnp.clip(video, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)
