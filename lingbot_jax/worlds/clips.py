"""From recorded clips to what networks are trained and sampled on: `prepare` on the host, `encode` on the mesh."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from lingbot_jax.models.codec import Codec, to_float
from lingbot_jax.models.text import TextEncoder
from lingbot_jax.worlds.condition import Camera, Conditioning, camera_of, conditioning_frames
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
    stride = config.codec.stride[0]
    names = ("c2w", "keys", "intrinsics")
    cameras = [camera_of(config.pose, stride, *row) for row in zip(*(rows[n] for n in names), strict=True)]
    camera = jax.tree.map(lambda *parts: np.stack(parts), *cameras)
    prompts = [str(prompt) for prompt in (rows[config.caption] if captions is None else captions)]
    if intervals is None:
        tokens = text_encoder.tokenize(prompts)
    else:
        middles = interval_middles(rows["frames"].shape[1], intervals, stride)
        parts = [
            f"{prompt} {event}".strip()
            for prompt, events in zip(prompts, rows["temporal"][:, middles], strict=True)
            for event in events
        ]
        split = lambda x: x.reshape(len(prompts), intervals, *x.shape[1:])
        tokens = jax.tree.map(split, text_encoder.tokenize(parts))
    return Clips(rows["frames"], camera, tokens, np.asarray(known, np.int32))


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


def _encode_text(text_encoder: TextEncoder, tokens: Any) -> Float[Array, "b *n l d"]:
    lead = tokens.mask.shape[:-1]
    text = text_encoder(jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(lead) :]), tokens))
    return text.reshape(*lead, *text.shape[1:])


encode_condition = jax.jit(encode, static_argnames=("latents",))
