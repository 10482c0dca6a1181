"""Crops of clips to latents, ahead of training: what a codec and a text encoder do for `data.encode`, on a mesh.

Samples are split over data x fsdp. A crop goes through the codec in chunks of time, with the codec's own stream
between them, so that neither the video in floats nor the activations of a long one are ever on a device whole.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Shaped, UInt8

from lingbot_jax.models.codec import Codec, Stream, to_float
from lingbot_jax.models.config import CodecConfig, NgramConfig, TextConfig
from lingbot_jax.models.text import TextEncoder
from lingbot_jax.parallel.mesh import BATCH_AXES
from lingbot_jax.parallel.sharding import batch_sharding, constrain_batch
from lingbot_jax.worlds.world import encode_tokens

TEXTS = 16  # that are encoded at a time, at least


@dataclasses.dataclass(frozen=True)
class ClipEncoder:
    """A codec and a text encoder on a mesh whose devices this process has.

    Attributes:
      batch: crops at a time. chunk: latent frames that one program encodes of each.
    """

    codec: Codec
    text: TextEncoder
    mesh: Mesh
    batch: int
    chunk: int

    @property
    def text_dtype(self) -> str:
        return stored_dtype(self.text.config)

    def latents(self, frames: UInt8[np.ndarray, "b f H W 3"]) -> list[Float[Array, "b n h w c"]]:
        """Latents of crops, each from its own first frame, chunk by chunk in time; dispatched, not waited for."""
        stride, chunks, stream, start = self.codec.config.stride[0], [], None, 0
        while start < frames.shape[1]:
            end = stride * (len(chunks) + 1) * self.chunk - stride + 1
            part = self._placed(frames[:, start:end])
            with jax.set_mesh(self.mesh):
                made, stream = _encode(self.codec, part, stream) if chunks else _begin(self.codec, part)
            chunks.append(made)
            start = end
        return chunks

    def tails(
        self, frames: UInt8[np.ndarray, "b f H W 3"], conditioning: int, length: int
    ) -> Float[Array, "b k m h w c"]:
        """Latents of the m = `length` grey frames behind k = 1, 2, ... `conditioning` known latent frames."""
        known = self.codec.config.video_frames(conditioning)
        padded = frames[:, :known]
        short = known - padded.shape[1]  # no crop has so many known frames, and nothing reads these
        padded = np.pad(padded, ((0, 0), (0, short), (0, 0), (0, 0), (0, 0)))
        with jax.set_mesh(self.mesh):
            return _tails(self.codec, self._placed(padded), length=length)

    def grey(self, height: int, width: int) -> Float[Array, "h w c"]:
        """A latent frame of mid-grey video, behind more of it than the codec remembers."""
        with jax.set_mesh(self.mesh):
            return _grey(self.codec, height, width)

    def texts(self, texts: Sequence[str]) -> list[Float[np.ndarray, "n d"]]:
        """Tokens of each text, as many as it has."""
        rows = math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        count = rows * -(-TEXTS // rows)
        made: list[np.ndarray] = []
        for first in range(0, len(texts), count):
            some = list(texts[first : first + count])
            tokens = self.text.tokenize(some + [""] * (count - len(some)))
            with jax.set_mesh(self.mesh):
                whole = np.asarray(encode_tokens(self.text, self._placed(tokens)))
            made += [text[: int(m.sum())] for text, m in zip(whole, tokens.mask, strict=True)][: len(some)]
        return made

    def _placed(self, rows: Any) -> Any:
        return jax.device_put(rows, batch_sharding(self.mesh))


def stored_dtype(config: CodecConfig | TextConfig) -> str:
    """What keeps latents or texts of an encoder finer than it rounds itself: four times as fine as bfloat16, or all."""
    exact = isinstance(config, NgramConfig) or getattr(config, "dtype", "float32") == "float32"
    return "float32" if exact else "float16"


@jax.jit
def _begin(codec: Codec, frames: Shaped[Array, "b f H W 3"]) -> tuple[Float[Array, "b n h w c"], Stream]:
    stream = codec.init_encode_stream(frames.shape[0], *frames.shape[2:4])
    return jax.tree.map(constrain_batch, codec.encode_chunk(to_float(frames), stream, first=True))


@functools.partial(jax.jit, donate_argnames="stream")
def _encode(
    codec: Codec, frames: Shaped[Array, "b f H W 3"], stream: Stream
) -> tuple[Float[Array, "b n h w c"], Stream]:
    return jax.tree.map(constrain_batch, codec.encode_chunk(to_float(frames), stream, first=False))


@functools.partial(jax.jit, static_argnames="length")
def _tails(codec: Codec, frames: Shaped[Array, "b f H W 3"], length: int) -> Float[Array, "b k m h w c"]:
    video, group = to_float(frames), codec.config.stride[0]
    batch, _, height, width = video.shape[:4]
    grey = jnp.zeros((batch, group, height, width, 3))

    def fade(stream: Stream, _: None) -> tuple[Stream, Array]:
        latents, stream = codec.encode_chunk(grey, stream, first=False)
        return stream, latents[:, 0]

    def known(stream: Stream, following: Array) -> tuple[Stream, Array]:
        tail = jax.lax.scan(fade, stream, None, length=length)[1]
        return codec.encode_chunk(following, stream, first=False)[1], tail

    stream = codec.init_encode_stream(batch, height, width)
    stream = jax.tree.map(constrain_batch, codec.encode_chunk(video[:, :1], stream, first=True)[1])
    groups = jnp.concatenate([video[:, 1:], grey], axis=1)  # the last is not looked at
    groups = jnp.moveaxis(groups.reshape(batch, -1, group, height, width, 3), 1, 0)
    tails = jax.lax.scan(known, stream, groups)[1]  # k m b h w c
    return jnp.moveaxis(tails, 2, 0)


@functools.partial(jax.jit, static_argnames=("height", "width"))
def _grey(codec: Codec, height: int, width: int) -> Float[Array, "h w c"]:
    group = jnp.zeros((1, codec.config.stride[0], height, width, 3))
    stream = codec.init_encode_stream(1, height, width)
    latents, stream = codec.encode_chunk(group[:, :1], stream, first=True)

    def step(_: int, carry: tuple[Array, Stream]) -> tuple[Array, Stream]:
        return codec.encode_chunk(group, carry[1], first=False)

    return jax.lax.fori_loop(0, codec.config.memory + 1, step, (latents, stream))[0][0, 0]
