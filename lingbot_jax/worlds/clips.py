"""From recorded clips to what networks are trained and sampled on: `prepare` on the host, `encode` on the mesh.

Of clips that were encoded ahead of training (`worlds.encode`): `prepare_latents` and `unpack`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from lingbot_jax.models.codec import Codec, to_float
from lingbot_jax.models.text import TextEncoder
from lingbot_jax.worlds.condition import (
    Camera,
    Conditioning,
    camera_of,
    conditioning_frames,
    conditioning_mask,
)
from lingbot_jax.worlds.config import WorldConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clips:
    """Rows of a batch as they travel to the devices: bytes of video, small arrays of everything else.

    Attributes:
      frames: uint8 or float in [-1, 1].
      tokens: of the prompts, as the text encoder's `tokenize` gives them; by clip and interval where there are such.
      known: latent frames of each clip that the network is given.
    """

    frames: Shaped[Array | np.ndarray, "b f H W 3"]
    camera: Camera
    tokens: Any
    known: Int[Array | np.ndarray, "b"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Latents:
    """Rows of a batch of encoded clips, as they travel to the devices.

    Attributes:
      latents: as stored. image: of the conditioning frames. text: of the n texts of a clip.
      known: latent frames of each clip that the network is given.
    """

    latents: Float[Array | np.ndarray, "b t h w c"]
    image: Float[Array | np.ndarray, "b t h w c"]
    text: Float[Array | np.ndarray, "b *n l d"]
    camera: Camera
    known: Int[Array | np.ndarray, "b"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """Clips as networks see them. `latents` is None where only the condition was asked for.

    `text` has an axis n where the n intervals of a clip have texts of their own.
    """

    latents: Float[Array, "b t h w c"] | None
    text: Float[Array, "b *n l d"]
    camera: Camera
    conditioning: Conditioning


def prepare(
    config: WorldConfig,
    text_encoder: TextEncoder,
    rows: dict[str, Any],
    known: Int[np.ndarray, "b"],
    captions: Sequence[str] | None = None,
    intervals: int | None = None,
) -> Clips:
    """Host rows (a loader's batch: frames, keys, c2w, intrinsics, captions) as NumPy arrays for the devices.

    Args:
      captions: the prompts; None: the caption that the world reads.
      intervals: equal parts of a clip, in latent frames, each with a text of its own: the caption, and after it what
        the temporal caption says of the middle of the part. None: one text per clip.
    """
    prompts = [str(prompt) for prompt in (rows[config.caption] if captions is None else captions)]
    events = [()] * len(prompts) if intervals is None else rows["temporal"]
    texts = [texts_of(config, *row, intervals) for row in zip(prompts, events, strict=True)]
    tokens = text_encoder.tokenize([text for own in texts for text in own])
    if intervals is not None:
        tokens = jax.tree.map(lambda x: x.reshape(len(texts), intervals, *x.shape[1:]), tokens)
    return Clips(rows["frames"], cameras_of(config, rows), tokens, np.asarray(known, np.int32))


def prepare_latents(config: WorldConfig, rows: dict[str, Any], intervals: int | None = None) -> Latents:
    """Host rows of latents (a loader's batch: latents, image, text, known, keys, c2w, intrinsics) for the devices."""
    text = rows["text"] if intervals is not None else rows["text"][:, 0]
    return Latents(rows["latents"], rows["image"], text, cameras_of(config, rows), rows["known"])


def cameras_of(config: WorldConfig, rows: Mapping[str, Any]) -> Camera:
    """The cameras of host rows."""
    each = zip(*(rows[name] for name in ("c2w", "keys", "intrinsics")), strict=True)
    cameras = [camera_of(config.pose, config.codec.stride[0], *row) for row in each]
    return jax.tree.map(lambda *parts: np.stack(parts), *cameras)


def texts_of(config: WorldConfig, prompt: str, events: Sequence[str], intervals: int | None) -> list[str]:
    """The texts of a clip: its prompt, or that of each of `intervals` equal parts, with what happens in the middle.

    Args:
      events: at every video frame.
    """
    if intervals is None:
        return [prompt]
    middles = interval_middles(len(events), intervals, config.codec.stride[0])
    return [f"{prompt} {events[middle]}".strip() for middle in middles]


def interval_middles(frames: int, intervals: int, stride: int) -> Int[np.ndarray, "n"]:
    """The video frame in the middle of each of n equal parts of a clip of stride * (t - 1) + 1 frames.

    Latent frame 0 is video frame 0; latent frame i > 0 is the `stride` frames that end with stride * i.
    """
    per = ((frames - 1) // stride + 1) // intervals
    starts = np.arange(intervals) * per
    first = np.maximum(stride * (starts - 1) + 1, 0)
    return (first + stride * (starts + per - 1)) // 2


def encode(codec: Codec, text_encoder: TextEncoder, clips: Clips, *, latents: bool = True) -> Encoded:
    """Pure; trace it inside one jit on the world's mesh.

    Args:
      latents: False: the condition only; frames after the known ones are not looked at.
    """
    video = to_float(clips.frames)
    return Encoded(
        latents=codec.encode(video) if latents else None,
        text=_encode_text(text_encoder, clips.tokens),
        camera=clips.camera,
        conditioning=conditioning_frames(codec, video, clips.known),
    )


def unpack(clips: Latents, *, stride: int) -> Encoded:
    """Pure; trace it inside one jit on the world's mesh. No codec and no text encoder has a part in it.

    Args:
      stride: of the codec in time.
    """
    wide = lambda x: x.astype(jnp.float32)
    mask = conditioning_mask(clips.known, clips.latents.shape[1:4], stride)
    return Encoded(wide(clips.latents), wide(clips.text), clips.camera, Conditioning(mask, wide(clips.image)))


def _encode_text(text_encoder: TextEncoder, tokens: Any) -> Float[Array, "b *n l d"]:
    lead = tokens.mask.shape[:-1]
    text = text_encoder(jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(lead) :]), tokens))
    return text.reshape(*lead, *text.shape[1:])


encode_condition = jax.jit(encode, static_argnames=("latents",))
