"""From windows of recorded clips to what the objectives train on: latents and their condition."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from lingbot_jax.config import DiTConfig
from lingbot_jax.control import poses
from lingbot_jax.control.keyboard import MOVEMENT
from lingbot_jax.control.plucker import control, latent_keys
from lingbot_jax.data.loader import Batch as Window
from lingbot_jax.models.codec import Codec
from lingbot_jax.models.condition import image_condition
from lingbot_jax.models.dit import Condition
from lingbot_jax.models.text import TextEncoder
from lingbot_jax.training.config import PoseConfig
from lingbot_jax.training.step import Batch


class ClipEncoder:
    """Encodes windows of clips; the codec runs jitted on the device, poses and text on the host in float64.

    The condition is made here once, and used alike by training and by generation for known keys.
    """

    def __init__(self, codec: Codec, text_encoder: TextEncoder, model: DiTConfig, pose: PoseConfig):
        self._text_encoder, self._model, self._pose, self._codec = text_encoder, model, pose, codec
        self._text = functools.lru_cache(maxsize=4096)(lambda text: text_encoder.encode([text])[0])
        self._encode = jax.jit(functools.partial(_encode, mode=model.control, stride=model.spatial_stride))

    def __call__(self, window: Window, captions: Sequence[str], given: Int[np.ndarray | Array, "b"]) -> Batch:
        """Latents of a window's frames, conditioned on the first `given` latent frames, the keys and the captions.

        Args:
          window: frames, keys, c2w and intrinsics, as a loader batch has them.
          given: latent frames known of each sample; frames after them do not reach the condition.
        """
        relative = np.stack([self.relative_poses(path) for path in window["c2w"]]).astype(np.float32)
        text = np.stack([self._text(caption) for caption in captions])
        movement = window["keys"][..., : len(MOVEMENT)]
        intrinsics = window["intrinsics"][:, :1]
        return self._encode(self._codec, window["frames"], movement, relative, intrinsics, text, given)

    def relative_poses(self, c2w: Float[np.ndarray, "f 4 4"]) -> Float[np.ndarray, "t 4 4"]:
        """Poses of the latent frames as the control sees them (float64)."""
        t = self._codec.config.latent_frames(len(c2w))
        normalise = "max_norm" if self._pose.translation == "max_norm" else None
        return poses.relative(poses.resample(c2w, t), self._pose.reference, normalise)


def _encode(
    codec: Codec,
    frames: UInt8[Array, "b f h w 3"],
    movement: UInt8[Array, "b f 4"],
    relative: Float[Array, "b t 4 4"],
    intrinsics: Float[Array, "b 1 4"],
    text: Float[Array, "b l d"],
    given: Int[Array, "b"],
    *,
    mode: str,
    stride: int,
) -> Batch:
    video = frames.astype(jnp.float32) / 127.5 - 1.0
    mask, image = image_condition(codec, video, given)
    packed = None
    if mode != "none":
        held = None if mode == "cam" else latent_keys(movement, codec.config.stride[0])
        packed = control(relative, intrinsics, held, mode, *video.shape[2:4], stride)
    condition = Condition(text=text, control=packed, mask=mask, image=image)
    return Batch(latents=codec.encode(video), condition=condition)
