"""From windows of recorded clips to what the objectives train on: latents and their condition."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from lingbot_jax.models.config import DiTConfig
from lingbot_jax.control import poses
from lingbot_jax.control.keyboard import MOVEMENT
from lingbot_jax.control.plucker import control, latent_keys
from lingbot_jax.data.loader import Batch as Window
from lingbot_jax.models.codec import Codec, to_float
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
        static = {"mode": model.control, "stride": model.spatial_stride}
        self._condition = jax.jit(functools.partial(_condition, **static))
        self._batch = jax.jit(functools.partial(_batch, **static))

    def __call__(self, window: Window, captions: Sequence[str], given: Int[np.ndarray | Array, "b"]) -> Batch:
        """Latents of a window's frames, and what `condition` says about them."""
        return self._batch(*self._inputs(window, captions, given))

    def condition(
        self, window: Window, captions: Sequence[str], given: Int[np.ndarray | Array, "b"]
    ) -> Condition:
        """The first `given` latent frames, the control and the captions of a window.

        Args:
          window: frames, keys, c2w and intrinsics, as a loader batch has them; the intrinsics of the first frame
            count. Frames after the given ones are not looked at.
          given: latent frames known of each sample.
        """
        return self._condition(*self._inputs(window, captions, given))

    def _inputs(self, window: Window, captions: Sequence[str], given: Int[np.ndarray | Array, "b"]) -> tuple:
        relative = np.stack([self.relative_poses(path) for path in window["c2w"]]).astype(np.float32)
        text = np.stack([self._text(caption) for caption in captions])
        movement = window["keys"][..., : len(MOVEMENT)]
        return self._codec, window["frames"], movement, relative, window["intrinsics"][:, :1], text, given

    def relative_poses(self, c2w: Float[np.ndarray, "f 4 4"]) -> Float[np.ndarray, "t 4 4"]:
        """Poses of the latent frames as the control sees them (float64)."""
        t = self._codec.config.latent_frames(len(c2w))
        normalise = "max_norm" if self._pose.translation == "max_norm" else None
        return poses.relative(poses.resample(c2w, t), self._pose.reference, normalise)


def _condition(
    codec: Codec,
    frames: Shaped[Array, "b f h w 3"],
    movement: Shaped[Array, "b f 4"],
    relative: Float[Array, "b t 4 4"],
    intrinsics: Float[Array, "b 1 4"],
    text: Float[Array, "b l d"],
    given: Int[Array, "b"],
    *,
    mode: str,
    stride: int,
) -> Condition:
    mask, image = image_condition(codec, to_float(frames), given)
    packed = None
    if mode != "none":
        held = None if mode == "cam" else latent_keys(movement, codec.config.stride[0])
        packed = control(relative, intrinsics, held, mode, *frames.shape[2:4], stride)
    return Condition(text=text, control=packed, mask=mask, image=image)


def _batch(codec: Codec, frames: Shaped[Array, "b f h w 3"], *rest: Array, mode: str, stride: int) -> Batch:
    condition = _condition(codec, frames, *rest, mode=mode, stride=stride)
    return Batch(latents=codec.encode(to_float(frames)), condition=condition)
