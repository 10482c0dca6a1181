"""The Wan 2.1 VAE as a codec: causal in time, stride (4, 8, 8), whole clips and streams by one code path.

`encode` and `decode` of a whole clip are the stream functions over all of its frames: a `lax.scan` over
latent frames with the caches of all causal convolutions as carry. Memory therefore does not grow with the
length, beyond the video itself. Filling and the `opening` flag: see `vae_layers`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lingbot_jax.config import require
from lingbot_jax.models.codec import Stream
from lingbot_jax.models.config import VAEConfig
from lingbot_jax.models.vae_layers import (
    CausalConv,
    Downsample,
    Frames,
    Linear,
    Middle,
    Opening,
    Residual,
    Resized,
    RMSNorm,
    Upsample,
    Wider,
)


class Encoder(nnx.Module):
    """Video frames to raw latent moments (2z channels)."""

    def __init__(self, config: VAEConfig, key: jax.Array):
        keys = iter(jax.random.split(key, 64))
        widths = [config.width * mult for mult in config.mults]
        self.conv_in = CausalConv(3, config.width, next(keys))
        layers, inputs = [], config.width
        for level, outputs in enumerate(widths):
            for _ in range(config.blocks):
                layers.append(Residual(inputs, outputs, next(keys)))
                inputs = outputs
            if level < len(widths) - 1:
                layers.append(Downsample(outputs, next(keys), time=config.time_strides[level]))
        self.layers = nnx.List(layers)
        self.middle = Middle(inputs, next(keys))
        self.norm_out = RMSNorm(inputs, key)
        self.conv_out = CausalConv(inputs, 2 * config.channels, next(keys))

    def stream(self, batch: int, height: int, width: int, dtype: jnp.dtype) -> Stream:
        """Caches before the first frame; height and width in pixels."""
        cache = {"in": self.conv_in.stream(batch, height, width, dtype), "layers": []}
        for layer in self.layers:
            cache["layers"].append(layer.stream(batch, height, width, dtype))
            if isinstance(layer, Downsample):
                height, width = height // 2, width // 2
        cache["middle"] = self.middle.stream(batch, height, width, dtype)
        cache["out"] = self.conv_out.stream(batch, height, width, dtype)
        return cache

    def __call__(self, x: Frames, cache: Stream, opening: Opening) -> tuple[Resized, Stream]:
        """One group of frames to the moments of one latent frame."""
        new = {"layers": []}
        x, new["in"] = self.conv_in(x, cache["in"], opening)
        for layer, old in zip(self.layers, cache["layers"], strict=True):
            x, later = layer(x, old, opening)
            new["layers"].append(later)
        x, new["middle"] = self.middle(x, cache["middle"], opening)
        x, new["out"] = self.conv_out(jax.nn.silu(self.norm_out(x)), cache["out"], opening)
        return x, new


class Decoder(nnx.Module):
    """Raw latents (z channels) to video frames."""

    def __init__(self, config: VAEConfig, key: jax.Array):
        keys = iter(jax.random.split(key, 64))
        widths = [config.width * mult for mult in reversed(config.mults)]
        self.conv_in = CausalConv(config.channels, widths[0], next(keys))
        self.middle = Middle(widths[0], next(keys))
        layers, inputs = [], widths[0]
        for level, outputs in enumerate(widths):
            for _ in range(config.blocks + 1):
                layers.append(Residual(inputs, outputs, next(keys)))
                inputs = outputs
            if level < len(widths) - 1:
                layers.append(Upsample(outputs, next(keys), time=config.time_strides[::-1][level]))
                inputs = outputs // 2
        self.layers = nnx.List(layers)
        self.norm_out = RMSNorm(inputs, key)
        self.conv_out = CausalConv(inputs, 3, next(keys))

    def stream(self, batch: int, height: int, width: int, dtype: jnp.dtype) -> Stream:
        """Caches before the first frame; height and width in latent pixels."""
        cache = {"in": self.conv_in.stream(batch, height, width, dtype), "layers": []}
        cache["middle"] = self.middle.stream(batch, height, width, dtype)
        for layer in self.layers:
            cache["layers"].append(layer.stream(batch, height, width, dtype))
            if isinstance(layer, Upsample):
                height, width = height * 2, width * 2
        cache["out"] = self.conv_out.stream(batch, height, width, dtype)
        return cache

    def bottom(self, x: Frames, cache: Stream, opening: Opening) -> tuple[Wider, Stream]:
        """The part at latent resolution."""
        x, conv_in = self.conv_in(x, cache["in"], opening)
        x, middle = self.middle(x, cache["middle"], opening)
        return x, {"in": conv_in, "middle": middle}

    def __call__(self, x: Frames, cache: Stream, opening: Opening) -> tuple[Resized, Stream]:
        """One latent frame to one group of frames."""
        x, new = self.bottom(x, cache, opening)
        new["layers"] = []
        for layer, old in zip(self.layers, cache["layers"], strict=True):
            x, later = layer(x, old, opening)
            new["layers"].append(later)
        x, new["out"] = self.conv_out(jax.nn.silu(self.norm_out(x)), cache["out"], opening)
        return x, new


class WanVAE(nnx.Module):
    """The codec. Methods are pure; see `codec.Codec` for the interface."""

    def __init__(self, config: VAEConfig, key: jax.Array):
        keys = jax.random.split(key, 4)
        self.config = config
        self.encoder = Encoder(config, keys[0])
        self.moments = Linear(2 * config.channels, 2 * config.channels, keys[1])
        self.unmoments = Linear(config.channels, config.channels, keys[2])
        self.decoder = Decoder(config, keys[3])

    def encode(self, video: Float[Array, "b f h w 3"]) -> Float[Array, "b t hl wl c"]:
        """Video in [-1, 1] of 4n+1 frames to normalised latents: the mean of the posterior."""
        batch, _, height, width, _ = video.shape
        return self.encode_chunk(video, self.init_encode_stream(batch, height, width), first=True)[0]

    def decode(self, latents: Float[Array, "b t hl wl c"]) -> Float[Array, "b f h w 3"]:
        """Normalised latents to video, clipped to [-1, 1]; f = 4 (t - 1) + 1."""
        batch, _, height, width, _ = latents.shape
        return self.decode_chunk(latents, self.init_stream(batch, height, width), first=True)[0]

    def init_stream(self, batch: int, height: int, width: int) -> Stream:
        """The state before the first chunk of a decode; height and width in latent pixels."""
        return self.decoder.stream(batch, height, width, jnp.dtype(self.config.dtype))

    def init_encode_stream(self, batch: int, height: int, width: int) -> Stream:
        """The state before the first chunk of an encode; height and width in pixels.

        Raises:
          ConfigError: they are not multiples of the stride.
        """
        stride = self.config.stride
        for name, size, step in (("height", height, stride[1]), ("width", width, stride[2])):
            require(size % step == 0, f"video {name}", size, f"must be a multiple of {step}")
        return self.encoder.stream(batch, height, width, jnp.dtype(self.config.dtype))

    def encode_chunk(
        self, video: Float[Array, "b f h w 3"], stream: Stream, *, first: bool
    ) -> tuple[Float[Array, "b t hl wl c"], Stream]:
        """Encodes the next frames: 4t, or 4(t - 1) + 1 where `first` (static) says that they open the stream.

        Raises:
          ConfigError: another number of frames.
        """
        group = self.config.stride[0]
        filling = jnp.zeros_like(video, shape=(video.shape[0], group - 1, *video.shape[2:]))
        if first:
            self.config.latent_frames(video.shape[1])
            video = jnp.concatenate([filling, video], axis=1)
        require(video.shape[1] % group == 0, "frames", video.shape[1], f"must be a multiple of {group}")
        groups = video.reshape(video.shape[0], -1, group, *video.shape[2:]).astype(self.config.dtype)

        def step(cache, inputs):
            group, opening = inputs
            moments, cache = self.encoder(group, cache, opening)
            return cache, moments[:, 0]

        stream, moments = jax.lax.scan(step, stream, self._scanned(groups, first))
        mean, std = self._statistics()
        raw = self.moments(jnp.moveaxis(moments, 0, 1)).astype(jnp.float32)[..., : self.config.channels]
        return (raw - mean) / std, stream

    def decode_chunk(
        self, latents: Float[Array, "b t hl wl c"], stream: Stream, *, first: bool
    ) -> tuple[Float[Array, "b f h w 3"], Stream]:
        """Decodes the next latent frames into 4t frames, or 4(t - 1) + 1 where `first` (static) is set."""
        frames, stream = self.decode_raw(latents, stream, first=first)
        return jnp.clip(frames, -1.0, 1.0), stream

    def decode_raw(
        self, latents: Float[Array, "b t hl wl c"], stream: Stream, *, first: bool
    ) -> tuple[Float[Array, "b f h w 3"], Stream]:
        """`decode_chunk` without the clipping."""
        mean, std = self._statistics()
        raw = self.unmoments((latents * std + mean).astype(self.config.dtype))[:, :, None]

        def step(cache, inputs):
            latent, opening = inputs
            frames, cache = self.decoder(latent, cache, opening)
            return cache, frames.astype(jnp.float32)

        stream, groups = jax.lax.scan(step, stream, self._scanned(raw, first))
        batch, group = latents.shape[0], self.config.stride[0]
        frames = jnp.moveaxis(groups, 0, 1).reshape(batch, -1, *groups.shape[3:])
        return frames[:, group - 1 :] if first else frames, stream

    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        return np.float32(self.config.mean), np.float32(self.config.std)

    def _scanned(self, groups: Float[Array, "b n t h w c"], first: bool):
        """Scan inputs: groups, and the opening flag where there can be an opening."""
        leading = jnp.moveaxis(groups, 1, 0)
        return (leading, jnp.arange(len(leading)) == 0) if first else (leading, None)
