"""Camera poses on the host: check, invert, resample to latent frames, make relative (docs/control.md).

Everything here is float64 NumPy: recorded trajectories lie hundreds of units from the origin and move by
1e-4 per frame, which float32 cannot subtract. Poses are camera-to-world `[f 4 4]` in OpenCV axes (x right,
y down, z forward); intrinsics are fx, fy, cx, cy in pixels, with pixel centres at +0.5.
"""

import math
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float64
from scipy.spatial.transform import Rotation, Slerp

from lingbot_jax.config import ConfigError, require

Poses = Float64[np.ndarray, "f 4 4"]
BASE_SIZE = (480, 832)  # height, width that published intrinsics belong to
FARTHEST = 1e9  # world units from the origin; float64 then still tells 1e-7 apart
FOCAL = (1e-3, 1e6)  # pixels; also how far the principal point may lie from the image's corner
RIGID = 1e-3  # allowed deviation of R^T R from the identity: poses are often stored in float32


def validate(c2w: object, field: str = "poses") -> Poses:
    """Returns `c2w` as float64 [f 4 4] after checking that every frame is a rigid transform.

    Raises:
      ConfigError: one line naming the frame and what is wrong there.
    """
    array = np.asarray(c2w)
    if array.ndim != 3 or array.shape[1:] != (4, 4) or not len(array):
        raise ConfigError(f"{field} has shape {array.shape}: must be [frames 4 4], camera to world")
    if array.dtype.kind not in "fiu":
        raise ConfigError(f"{field} has type {array.dtype}: must be numbers")
    array = array.astype(np.float64)
    rotation = array[:, :3, :3]
    _each(np.isfinite(array).all((1, 2)), field, array, "must be finite")
    far = np.abs(array[:, :3, 3]).max(1)
    _each(far <= FARTHEST, f"{field}.translation", far, f"must be at most {FARTHEST:g} world units")
    _each((array[:, 3] == [0, 0, 0, 1]).all(1), f"{field}.row3", array[:, 3], "must be 0 0 0 1")
    off = np.abs(rotation.transpose(0, 2, 1) @ rotation - np.eye(3)).max((1, 2))
    _each(off <= RIGID, f"{field}.orthogonality_error", off, f"must be at most {RIGID}; is it scaled?")
    det = np.linalg.det(rotation)
    _each(det > 0, f"{field}.determinant", det, "must be +1; is an axis mirrored?")
    return array


def _each(ok: np.ndarray, field: str, value: np.ndarray, allowed: str) -> None:
    """Refuses the first frame that is not ok, by its index."""
    if ok.all():
        return
    frame = int(np.argmin(ok))
    name, _, part = field.partition(".")
    shown = " ".join(f"{x:.4g}" for x in np.ravel(value[frame]))
    raise ConfigError(f"{name}[{frame}]{'.' * bool(part)}{part} = {shown}: {allowed}")


def invert(c2w: Float64[np.ndarray, "*f 4 4"]) -> Float64[np.ndarray, "*f 4 4"]:
    """World-to-camera from camera-to-world and back."""
    transposed = np.swapaxes(c2w[..., :3, :3], -1, -2)
    return _assemble(transposed, -(transposed @ c2w[..., :3, 3:])[..., 0])


def _assemble(rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    out = np.zeros((*rotation.shape[:-2], 4, 4))
    out[..., :3, :3], out[..., :3, 3], out[..., 3, 3] = rotation, translation, 1.0
    return out


def resample(c2w: Poses, t: int) -> Float64[np.ndarray, "t 4 4"]:
    """`t` poses evenly spread from the first to the last; with f = 4(t-1)+1, every fourth frame."""
    require(t >= 1, "t", t, "must be at least 1")
    return interpolate(c2w, np.linspace(0, len(c2w) - 1, t))


def interpolate(c2w: Poses, at: Float64[np.ndarray, "t"]) -> Float64[np.ndarray, "t 4 4"]:
    """Poses at fractional frame indices: translation linear, rotation along the shortest arc (slerp).

    Args:
      at: in [0, f-1].
    """
    last = len(c2w) - 1
    at = np.asarray(at, np.float64)
    inside = at.size > 0 and at.min() >= 0 and at.max() <= last
    require(bool(inside), "at", at.tolist(), f"must lie in [0, {last}]")
    low = np.minimum(at.astype(np.int64), max(last - 1, 0))
    high, weight = np.minimum(low + 1, last), at - low
    a, b = c2w[low, :3, 3], c2w[high, :3, 3]
    translation = a + weight[:, None] * (b - a)  # this form keeps a camera at rest exactly at rest
    rotations = Rotation.from_matrix(c2w[[*range(last + 1), last], :3, :3])  # SciPy wants two at least
    return _assemble(Slerp(np.arange(last + 2), rotations)(at).as_matrix(), translation)


def relative(
    c2w: Poses,
    to: str,
    normalise: str | float | None = None,
) -> Poses:
    """Poses seen from the first camera, or each from the camera before it; pose 0 is the identity.

    Args:
      to: "first" or "previous".
      normalise: "max_norm" divides all translations by the largest one, if any is above 0 (published
        pipelines; needs the whole path); a positive number divides by that many world units (needs no future,
        so interactive play can use it); None leaves world units.
    """
    require(to in ("first", "previous"), "to", to, "must be 'first' or 'previous'")
    index = np.zeros(len(c2w), np.int64) if to == "first" else np.maximum(np.arange(len(c2w)) - 1, 0)
    back = np.swapaxes(c2w[index, :3, :3], -1, -2)
    # Subtract before rotating: exact far from the origin, and exactly zero for a camera that does not move.
    translation = (back @ (c2w[:, :3, 3] - c2w[index, :3, 3])[..., None])[..., 0]
    out = _assemble(back @ c2w[:, :3, :3], translation)
    out[0] = np.eye(4)
    return _normalised(out, normalise)


def _normalised(c2w: np.ndarray, normalise: str | float | None) -> np.ndarray:
    if normalise is None:
        return c2w
    if normalise == "max_norm":
        largest = np.linalg.norm(c2w[:, :3, 3], axis=-1).max()
        unit = largest if largest > 0 else 1.0
    else:
        ok = isinstance(normalise, (int, float)) and np.isfinite(normalise) and normalise > 0
        require(
            bool(ok), "normalise", normalise, "must be None, 'max_norm' or a positive number of world units"
        )
        unit = normalise
    c2w[:, :3, 3] /= unit
    return c2w


def transform_intrinsics(
    intrinsics: Float[np.ndarray, "*f 4"],
    resize: tuple[int, int],
    crop: tuple[int, int] | None = None,
    base: tuple[int, int] = BASE_SIZE,
) -> Float64[np.ndarray, "*f 4"]:
    """Intrinsics after resizing a `base` image and cropping its centre; all sizes are (height, width).

    Args:
      intrinsics: fx, fy, cx, cy [*f 4] in pixels of the base image.
      resize: size after resizing; its aspect ratio may differ. crop: size after the crop (None: no crop).
    """
    crop = resize if crop is None else crop
    require(crop[0] <= resize[0] and crop[1] <= resize[1], "crop", crop, f"must fit into resize = {resize}")
    y, x = resize[0] / base[0], resize[1] / base[1]
    offset = np.array([0, 0, (resize[1] - crop[1]) / 2, (resize[0] - crop[0]) / 2])
    return np.asarray(intrinsics, np.float64) * [x, y, x, y] - offset


def validate_intrinsics(
    intrinsics: object, frames: int, field: str = "intrinsics"
) -> Float64[np.ndarray, "f 4"]:
    """Returns fx, fy, cx, cy of every frame as float64 [f 4]; one row [4] or [1 4] is repeated.

    Raises:
      ConfigError: wrong shape, not numbers, not finite, or outside of `FOCAL`.
    """
    array = np.asarray(intrinsics)
    if array.dtype.kind not in "fiu":
        raise ConfigError(f"{field} has type {array.dtype}: must be numbers")
    rows = array.reshape(1, -1) if array.ndim == 1 else array
    if rows.ndim != 2 or rows.shape[1] != 4 or len(rows) not in (1, frames):
        raise ConfigError(
            f"{field} has shape {array.shape}: must be [4], [1 4] or [{frames} 4] (fx fy cx cy)"
        )
    rows = rows.astype(np.float64)
    _each(np.isfinite(rows).all(1), field, rows, "must be finite")
    least, most = FOCAL
    ok = (rows[:, :2] >= least).all(1) & (rows[:, :2] <= most).all(1)
    _each(ok, field, rows, f"fx and fy must be positive, in [{least:g}, {most:g}] pixels")
    _each((np.abs(rows[:, 2:]) <= most).all(1), field, rows, f"cx and cy must lie within {most:g} pixels")
    return np.broadcast_to(rows, (frames, 4)).copy()


def load(folder: str | Path) -> tuple[Poses, Float64[np.ndarray, "f 4"]]:
    """Reads `poses.npy` and `intrinsics.npy` of a folder, as published examples carry them.

    Raises:
      ConfigError: a file is missing, is not a plain array, or fails `validate`.
    """
    folder = Path(folder)
    c2w = validate(_read(folder / "poses.npy"), "poses")
    intrinsics = _read(folder / "intrinsics.npy")
    # Recordings with one intrinsics row fewer than poses are common; equal rows need no count.
    if intrinsics.ndim == 2 and len(intrinsics) and (intrinsics == intrinsics[0]).all():
        intrinsics = intrinsics[0]
    return c2w, validate_intrinsics(intrinsics, len(c2w))


_HEADERS = {  # of versions of the format; others are for structured arrays
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def _read(path: Path) -> np.ndarray:
    if not path.is_file():
        raise ConfigError(
            f"{path}: missing; a camera folder holds poses.npy [f 4 4] and intrinsics.npy [f 4]"
        )
    with path.open("rb") as file:
        try:
            header = _HEADERS[np.lib.format.read_magic(file)]
            shape, _, dtype = header(file)
            if dtype.kind not in "fiu":
                raise ValueError(f"it holds {dtype}")
            # A header may declare any shape: only what is there is allocated.
            need, have = math.prod(shape) * dtype.itemsize, path.stat().st_size - file.tell()
            if min(shape, default=0) < 0 or need != have:
                raise ValueError(f"shape {shape} takes {need} bytes, the file has {have}")
            file.seek(0)
            return np.lib.format.read_array(file, allow_pickle=False)
        except Exception as error:  # NumPy's parser of headers raises whatever Python's does
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"{path}: not a plain .npy array of numbers ({reason[:200]})") from None
