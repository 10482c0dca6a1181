"""The path of the camera through a video that is to be generated: from keys, or recorded."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float64

from lingbot_jax.config import require
from lingbot_jax.control import keyboard, poses
from lingbot_jax.worlds.config import KeyboardConfig, PoseConfig


@dataclasses.dataclass(frozen=True)
class CameraPath:
    """One row per video frame.

    Attributes:
      c2w: camera to world. intrinsics: fx, fy, cx, cy in pixels of the video. keys: held during the transition into
        the frame.
    """

    c2w: Float64[np.ndarray, "f 4 4"]
    intrinsics: Float64[np.ndarray, "f 4"]
    keys: Bool[np.ndarray, "f 8"]

    def __len__(self) -> int:
        return len(self.c2w)

    def fitted(self, frames: int) -> "CameraPath":
        """Cut to `frames`, or standing still after the end."""
        more = max(frames - len(self), 0)
        grow = lambda a: np.concatenate([a, np.repeat(a[-1:], more, axis=0)])[:frames]
        keys = np.concatenate([self.keys, np.zeros((more, 8), bool)])[:frames]
        return CameraPath(grow(self.c2w), grow(self.intrinsics), keys)

    def stretched(self, frames: int) -> "CameraPath":
        """The whole path in another number of frames, as the published successor fits poses to whole chunks.

        Poses are interpolated; a frame has the keys and the intrinsics of the row at its place or next after it.
        """
        if frames == len(self):
            return self
        at = np.linspace(0, len(self) - 1, frames)
        row = np.ceil(at - 1e-9).astype(int)
        return CameraPath(poses.interpolate(self.c2w, at), self.intrinsics[row], self.keys[row])

    def window(self, start: int, frames: int) -> "CameraPath":
        """`frames` rows from `start`; after the end the camera stands still. The first has no transition."""
        part = CameraPath(self.c2w[start:], self.intrinsics[start:], self.keys[start:]).fitted(frames)
        part.keys[0] = False
        return part

    def unit(self, pose: PoseConfig, stride: int) -> float:
        """World units that count as 1 in the camera embedding, for the whole path at once.

        Args:
          stride: video frames per latent frame.
        """
        if pose.translation == "metric":
            return 1.0
        latent = poses.relative(poses.resample(self.c2w, (len(self) - 1) // stride + 1), pose.reference)
        largest = float(np.linalg.norm(latent[:, :3, 3], axis=-1).max())
        return largest if largest > 0 else 1.0


def from_keys(text: str, keys_do: KeyboardConfig, intrinsics: Float64[np.ndarray, "4"]) -> CameraPath:
    """Integrates keys written as `w-20,wl-12`. Raises ConfigError, which names the character."""
    keys = keyboard.parse(text)
    turn = keys_do.turn_rate
    c2w = keyboard.integrate(keys, step=keys_do.step_size, yaw_degrees=turn, pitch_degrees=turn)
    return CameraPath(c2w, np.tile(intrinsics, (len(keys), 1)), keys)


def from_folder(folder: str, size: tuple[int, int], base: tuple[int, int]) -> CameraPath:
    """Recorded poses; keys are read off the motion, with half of the usual displacement as threshold.

    Args:
      size: height and width of the video. base: of the image that the recorded intrinsics belong to.

    Raises:
      ConfigError: no poses there, or poses that are none.
    """
    c2w, intrinsics = poses.load(folder)
    moved = np.linalg.norm(np.diff(c2w[:, :3, 3], axis=0), axis=1)
    usual = float(np.median(moved[moved > 0])) if (moved > 0).any() else keyboard.STEP
    keys = keyboard.keys_from_poses(c2w, move=usual / 2)
    return CameraPath(c2w, poses.transform_intrinsics(intrinsics, size, base=base), keys)


def pinhole(size: tuple[int, int], fov: float) -> Float64[np.ndarray, "4"]:
    """fx, fy, cx, cy of a centred camera. `size`: height, width. `fov`: horizontal, in degrees, in (0, 180)."""
    height, width = size
    focal = width / 2 / np.tan(np.radians(fov) / 2)
    return np.array([focal, focal, width / 2, height / 2])


def clip_length(have: int, wanted: int | None, stride: int, chunk: int, *, pad: bool) -> int:
    """Frames of the video. Allowed are those of whole chunks of latent frames: stride * (chunk * n - 1) + 1.

    Args:
      have: rows of the path. wanted: frames asked for, or None for what the path gives: rounded up to an allowed
        length with `pad` (keys: stand still), else down as published (recorded poses).

    Raises:
      ConfigError: `wanted` is not allowed, or longer than recorded poses.
    """
    length = lambda n: stride * (chunk * n - 1) + 1
    chunks = (have - 1 + stride) / (stride * chunk)
    if wanted is None:
        n = int(np.ceil(chunks) if pad else np.floor(chunks))
        require(n > 0, "camera", f"{have} poses", f"a chunk needs {length(1)}")
        return length(n)
    nearest = length(max(1, round((wanted - 1 + stride) / (stride * chunk))))
    rule = f"{stride}n + 1" if chunk == 1 else f"{stride * chunk}n - {stride - 1} (whole chunks)"
    require(wanted == nearest, "frames", wanted, f"must be {rule}; the nearest is {nearest}")
    require(pad or wanted <= have, "frames", wanted, f"the poses give {have}; record more, or ask for less")
    return wanted
