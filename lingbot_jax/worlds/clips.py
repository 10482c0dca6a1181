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
      frames: uint8 or float in [-1, 1]. tokens: of the prompts, as the text encoder's `tokenize` gives them.
      known: latent frames of each clip that the network is given.
    """

    frames: Shaped[Array | np.ndarray, "b f H W 3"]
    camera: Camera
    tokens: Any
    known: Int[Array | np.ndarray, "b"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """Clips as networks see them. `latents` is None where only the condition was asked for."""

    latents: Float[Array, "b t h w c"] | None
    text: Float[Array, "b l d"]
    camera: Camera
    conditioning: Conditioning


def prepare(
    config: WorldConfig,
    text_encoder: TextEncoder,
    rows: dict[str, Any],
    known: Int[np.ndarray, "b"],
    captions: Sequence[str] | None = None,
) -> Clips:
    """Host rows (a loader's batch: frames, keys, c2w, intrinsics, captions) as NumPy arrays for the devices.

    Args:
      captions: the prompts; None: the caption that the world reads.
    """
    stride = config.codec.stride[0]
    names = ("c2w", "keys", "intrinsics")
    cameras = [camera_of(config.pose, stride, *row) for row in zip(*(rows[n] for n in names), strict=True)]
    camera = jax.tree.map(lambda *parts: np.stack(parts), *cameras)
    prompts = rows[config.caption] if captions is None else captions
    tokens = text_encoder.tokenize([str(prompt) for prompt in prompts])
    return Clips(rows["frames"], camera, tokens, np.asarray(known, np.int32))


def encode(codec: Codec, text_encoder: TextEncoder, clips: Clips, *, latents: bool = True) -> Encoded:
    """Pure; trace it inside one jit on the world's mesh.

    Args:
      latents: False: the condition only; frames after the known ones are not looked at.
    """
    video = to_float(clips.frames)
    return Encoded(
        latents=codec.encode(video) if latents else None,
        text=text_encoder(clips.tokens),
        camera=clips.camera,
        conditioning=conditioning_frames(codec, video, clips.known),
    )


encode_condition = jax.jit(encode, static_argnames=("latents",))
