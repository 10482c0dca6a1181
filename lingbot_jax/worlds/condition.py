"""The condition of a clip: what a network is told besides the noisy latent. Made here, for training, sampling and play.

Three parts come together in `make_condition`:

    text           tokens of the prompt, from the world's text encoder
    Camera         relative poses, intrinsics and actions per latent frame: small; the camera / action embedding of all
                   pixels is unfolded from them on the device, where it is used
    Conditioning   mask and latent of the frames that are known: the image a video starts from, or several
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lingbot_jax.config import require
from lingbot_jax.control import poses
from lingbot_jax.control.keyboard import MOVEMENT
from lingbot_jax.control.plucker import control, latent_keys
from lingbot_jax.models.codec import Codec
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.dit import Condition
from lingbot_jax.worlds.config import PoseConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Camera:
    """Where the camera is and what is pressed, per latent frame; arrays of NumPy or JAX, float32.

    Attributes:
      poses: `b t 4 4`, camera to world, relative as the world's PoseConfig says.
      intrinsics: `b 1 4`, fx fy cx cy in pixels of the video.
      actions: `b t 4`, share of the latent frame for which W A S D are held, in [0, 1].
    """

    poses: Float[Array | np.ndarray, "b t 4 4"]
    intrinsics: Float[Array | np.ndarray, "b 1 4"]
    actions: Float[Array | np.ndarray, "b t 4"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditioning:
    """The known frames of a clip as a network sees them.

    Attributes:
      mask: `b t h w m`, 1 where a pixel frame is known; m is the codec's stride in time.
      image: `b t h w c`, latent of the known frames followed by mid-grey ones.
    """

    mask: Float[Array, "b t h w m"]
    image: Float[Array, "b t h w c"]

    def at(self, frames: Int[Array, "n"]) -> "Conditioning":
        """Of given latent frames; those past the end are as the last one (grey stays grey)."""
        at = jnp.minimum(frames, self.image.shape[1] - 1)
        return Conditioning(self.mask[:, at], self.image[:, at])


def camera_of(
    pose: PoseConfig,
    stride: int,
    c2w: Float[np.ndarray, "f 4 4"],
    keys: Float[np.ndarray, "f 8"],
    intrinsics: Float[np.ndarray, "f 4"],
    unit: float | None = None,
) -> Camera:
    """The camera of one clip of f = stride * n + 1 video frames, without a batch axis, on the host in float64.

    Args:
      keys: row i held during the transition into frame i. intrinsics: those of the first frame count.
      unit: world units that become 1 in translations, in place of the clip's own largest.
    """
    t = (len(c2w) - 1) // stride + 1
    own = {"max_norm": "max_norm", "metric": None}[pose.translation]
    relative = poses.relative(poses.resample(c2w, t), pose.reference, own if unit is None else unit)
    movement = latent_keys(np.asarray(keys)[:, : len(MOVEMENT)], stride)
    rows = (relative, np.asarray(intrinsics)[:1], movement)
    return Camera(*(np.asarray(x, np.float32) for x in rows))


def camera_window(pose: PoseConfig, camera: Camera, first: Int[Array, ""] | int, count: int) -> Camera:
    """The camera of `count` latent frames from `first` on, as if the clip began there (`camera_of`)."""
    frames = first + jnp.arange(count, dtype=jnp.int32)
    poses, actions = jnp.asarray(camera.poses)[:, frames], jnp.asarray(camera.actions)[:, frames]
    turn, place = poses[..., :3, :3], poses[..., :3, 3]
    if pose.reference == "first":
        back = turn[:, :1].mT
        product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        place = product(back, (place - place[:, :1])[..., None])[..., 0]
        turn = product(back, turn)
    place, turn = place.at[:, 0].set(0.0), turn.at[:, 0].set(jnp.eye(3))
    if pose.translation == "max_norm":
        largest = jnp.linalg.norm(place, axis=-1).max(axis=1)[:, None, None]
        place = place / jnp.where(largest > 0, largest, 1.0)
    poses = poses.at[..., :3, :3].set(turn).at[..., :3, 3].set(place)
    return Camera(
        poses, camera.intrinsics, actions.at[:, 0].set(0.0)
    )  # no transition leads into its first frame


def conditioning_frames(
    codec: Codec, video: Float[Array, "b f H W 3"], known: Int[Array, "b"], latent_frames: int | None = None
) -> Conditioning:
    """Mask and latent of a clip whose first `known` latent frames are given.

    Frames that are not known become mid-grey (0) before encoding, as published: the conditioning latent holds
    nothing of the frames to be generated, though a codec's decoder sees both sides of the cut. Channel j of the
    mask of latent i is frame m * (i - 1) + 1 + j, and the first frame's mask is repeated m times.

    Args:
      video: in [-1, 1], m * (t - 1) + 1 frames; what stands after the known ones is ignored.
      known: latent frames known of each sample, in 0..t.
      latent_frames: t of the clip, where the video has the known frames only.

    Raises:
      ConfigError: a number of frames that the codec cannot have, or more than the clip.
    """
    m = codec.config.stride[0]
    t = codec.config.latent_frames(video.shape[1])
    if latent_frames is not None:
        total = codec.config.video_frames(latent_frames)
        have = video.shape[1]
        require(have <= total, "conditioning frames", have, f"must be at most the {total} frames of the clip")
        video = jnp.pad(video, ((0, 0), (0, total - have), (0, 0), (0, 0), (0, 0)))
        t = latent_frames
    given = jnp.arange(t) < known[:, None]  # b t
    pixels = jnp.concatenate([given[:, :1], jnp.repeat(given[:, 1:], m, axis=1)], axis=1)
    image = codec.encode(jnp.where(pixels[:, :, None, None, None], video, 0.0))
    mask = conditioning_mask(known, image.shape[1:4], m)
    return Conditioning(mask.astype(image.dtype), image)


def conditioning_mask(
    known: Int[Array, "b"], size: tuple[int, int, int], stride: int
) -> Float[Array, "b t h w m"]:
    """The mask of clips of `size` (t, h, w) whose first `known` latent frames are given; m is `stride`, in time."""
    given = jnp.arange(size[0]) < known[:, None]
    mask = jnp.broadcast_to(given[:, :, None, None, None], (len(known), *size, stride))
    return mask.astype(jnp.float32)


def make_condition(
    config: DiTConfig,
    size: tuple[int, int],
    text: Float[Array, "b l d"],
    camera: Camera | None,
    conditioning: Conditioning | None,
) -> Condition:
    """What a network of this config is told; parts that it does not take are left out.

    Args:
      size: height and width in latent pixels.

    Raises:
      ConfigError: a part that the network needs is missing.
    """
    embedding = None
    if config.control != "none":
        require(camera is not None, "camera", None, f"control = {config.control!r} needs one")
        actions = None if config.control == "cam" else camera.actions
        s = config.spatial_stride
        pixels = (size[0] * s, size[1] * s)
        embedding = control(camera.poses, camera.intrinsics, actions, config.control, *pixels, s)
    if not config.image_condition:
        return Condition(text=text, control=embedding)
    require(conditioning is not None, "conditioning", None, "an image-to-video network needs one")
    return Condition(text=text, control=embedding, mask=conditioning.mask, image=conditioning.image)
