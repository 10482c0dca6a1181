"""Visual odometry: camera poses from pictures alone, by tracked points (docs/curation.md). Needs the extra `data`.

Points are tracked from frame to frame (KLT). A pair of frames is first explained by a rotation alone: where the points
then lie within a fraction of a pixel, the camera did not move, and no direction is invented for it. Otherwise poselib
finds rotation and direction. The length of a step, in units of the first one, is what puts the points that are known in
space by then where they are seen; they are kept through turns on the spot, so that the scale on both sides of a turn is
the same. Where too few are left, the scale is unknown and a new piece of path begins.
"""

from typing import NamedTuple

import cv2
import numpy as np
import poselib
from jaxtyping import Bool, Float, Float64, Int, UInt8

_LEAST = 24  # points, below which a pair of frames says nothing
_LINKED = 10  # points known in space that a length is read from
_PARALLAX = 1.0  # pixels between two views of a point from which it is placed in space
_BETTER = 1.2  # times the parallax it was placed with, from which it is placed anew
_BACK = 0.5  # pixels that tracking there and back may miss
_EPIPOLAR = 1.0  # pixels, of inliers
_AGREED = 0.3  # degrees, up to which the refined pose is taken
_KLT = {
    "winSize": (21, 21),
    "maxLevel": 3,
    "criteria": (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 0.01),
}


class Path(NamedTuple):
    """A camera's path, pose 0 the identity; OpenCV axes.

    Attributes:
      c2w: camera to world. The unit is arbitrary, and another one in every piece.
      piece: which steps have a common unit; of steps into the frames. moving: whether a step was seen into a frame.
      trust: of each step in [0, 1]: share of the tracked points that fit, 0 where there were too few.
      apart: degrees between two rotations found for the same frame, from the pair alone and from points known in space.
    """

    c2w: Float64[np.ndarray, "f 4 4"]
    piece: Int[np.ndarray, "f"]
    moving: Bool[np.ndarray, "f"]
    trust: Float64[np.ndarray, "f"]
    apart: Float64[np.ndarray, "f"]


class _Tracks:
    """Points that are followed: where each is now, where it was first seen, and where it lies in space (or NaN)."""

    def __init__(self):
        self.now = np.zeros((0, 2))
        self.first = np.zeros((0, 2))
        self.since = np.zeros(0, np.int64)
        self.world = np.zeros((0, 3))
        self.parallax = np.zeros(0)

    def keep(self, ok: np.ndarray) -> None:
        for name, value in vars(self).items():
            setattr(self, name, value[ok])

    def fill(self, grey: np.ndarray, frame: int, count: int) -> None:
        """Finds new corners away from those there are, up to `count`."""
        missing = count - len(self.now)
        if missing < count // 5:
            return
        mask = np.full(grey.shape, 255, np.uint8)
        for x, y in self.now:
            cv2.circle(mask, (round(x), round(y)), 6, 0, -1)
        found = cv2.goodFeaturesToTrack(grey, missing, 0.003, 6, mask=mask, blockSize=5)
        if found is None:
            return
        new = found.reshape(-1, 2).astype(np.float64)
        n = len(new)
        self.now, self.first = np.concatenate([self.now, new]), np.concatenate([self.first, new])
        self.since = np.concatenate([self.since, np.full(n, frame)])
        self.world = np.concatenate([self.world, np.full((n, 3), np.nan)])
        self.parallax = np.concatenate([self.parallax, np.zeros(n)])


def track(
    before: UInt8[np.ndarray, "h w"], after: UInt8[np.ndarray, "h w"], points: Float64[np.ndarray, "n 2"]
) -> tuple[Float64[np.ndarray, "n 2"], Bool[np.ndarray, "n"]]:
    """Where points of `before` (OpenCV pixels, centres whole) are in `after`, and which are found there and back."""
    start = points.astype(np.float32).reshape(-1, 1, 2)
    there, found, _ = cv2.calcOpticalFlowPyrLK(before, after, start, None, **_KLT)
    back, again, _ = cv2.calcOpticalFlowPyrLK(after, before, there, None, **_KLT)
    there, back = there.reshape(-1, 2).astype(np.float64), back.reshape(-1, 2)
    height, width = before.shape
    inside = (there >= 0).all(1) & (there[:, 0] < width) & (there[:, 1] < height)
    near = np.linalg.norm(back - points, axis=1) < _BACK
    return there, found.ravel().astype(bool) & again.ravel().astype(bool) & inside & near


def bearings(
    points: Float64[np.ndarray, "n 2"], camera: Float[np.ndarray, "4"]
) -> Float64[np.ndarray, "n 3"]:
    """Rays (x, y, 1) of points in OpenCV pixels; `camera` has fx fy cx cy with pixel centres at +0.5."""
    flat = (points + 0.5 - camera[2:]) / camera[:2]
    return np.concatenate([flat, np.ones((len(flat), 1))], axis=1)


def rotation_between(
    a: Float64[np.ndarray, "n 3"], b: Float64[np.ndarray, "n 3"], rounds: int = 12
) -> tuple[Float64[np.ndarray, "3 3"], Float64[np.ndarray, "n"]]:
    """The rotation R that brings rays `a` to `b`, whatever a few do, and what is left of each, in focal lengths."""
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)
    ua, ub, weight = unit(a), unit(b), np.ones(len(a))
    for _ in range(rounds):
        u, _, vt = np.linalg.svd((ub * weight[:, None]).T @ ua)
        r = u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt
        seen = a @ r.T
        left = np.linalg.norm(seen[:, :2] / np.maximum(seen[:, 2:], 1e-6) - b[:, :2], axis=1)
        weight = 1 / np.maximum(left, 1e-4)  # least absolute deviations
    return r, left


def _relative(a: np.ndarray, b: np.ndarray, focal: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rotation and unit translation (x_b = R x_a + t) between normalised points, and which fit."""
    camera = {"model": "SIMPLE_PINHOLE", "width": 2, "height": 2, "params": [1.0, 0.0, 0.0]}
    ransac = {"max_epipolar_error": _EPIPOLAR / focal, "min_iterations": 100, "max_iterations": 2000}
    bundle = {"loss_type": "CAUCHY", "loss_scale": 0.3 / focal}
    pose, info = poselib.estimate_relative_pose(a[:, :2], b[:, :2], camera, camera, ransac, bundle)
    t = np.asarray(pose.t)
    return np.asarray(pose.R), t / max(np.linalg.norm(t), 1e-12), np.asarray(info["inliers"], bool)


def focal_lengths(grey: UInt8[np.ndarray, "f h w"], pairs: int = 12, moved: float = 24.0) -> list[float]:
    """Focal lengths that pairs of frames tell, in widths: of square pixels, the principal point in the middle.

    Args:
      pairs: of frames that are tried. moved: pixels (median) between the two of a pair, if the video has such.
    """
    height, width = grey.shape[1:]
    middle, found = np.array([width / 2, height / 2]), []
    for start in np.linspace(0, len(grey) - 2, pairs).astype(int):
        tracks = _Tracks()
        tracks.fill(grey[start], int(start), 400)
        far = 0.0
        for i in range(start + 1, min(len(grey), start + 16)):
            if len(tracks.now) < 2 * _LEAST or far > moved:
                break
            tracks.now, ok = track(grey[i - 1], grey[i], tracks.now)
            tracks.keep(ok)
            far = float(np.median(np.linalg.norm(tracks.now - tracks.first, axis=1))) if ok.any() else 0.0
        if len(tracks.now) < 2 * _LEAST or far < moved / 2:
            continue
        ransac = {"max_epipolar_error": _EPIPOLAR, "min_iterations": 100, "max_iterations": 1000}
        a, b = tracks.first + 0.5, tracks.now + 0.5
        pair, _ = poselib.estimate_shared_focal_relative_pose(a, b, middle, ransac, {})
        found.append(float(pair.camera1.focal()) / width)
    return found


def agreed_focal(told: list[float]) -> tuple[float, float]:
    """The middle of the narrowest half of what pairs told, and how far this half reaches, as a share.

    What cannot be (below 0.25 or above 3 widths) is left out; of fewer than five, nothing: (nan, inf).
    """
    values = np.sort([f for f in told if 0.25 < f < 3.0])
    if len(values) < 5:
        return float("nan"), float("inf")
    half = len(values) // 2 + 1
    begin = int(np.argmin(values[half - 1 :] / values[: len(values) - half + 1]))
    best = values[begin : begin + half]
    return float(np.median(best)), float(best[-1] / best[0] - 1)


def _length(
    world: np.ndarray, rays: np.ndarray, r: np.ndarray, centre: np.ndarray, step: np.ndarray, focal: float
):
    """How far along `step` (unit, world axes) the camera went from `centre`, by points known in space.

    Returns (length, its relative spread, points used); NaN where none can tell.
    """
    v, t = (world - centre) @ r, step @ r
    a = t[:2] - rays[:, :2] * t[2]
    c = v[:, :2] - rays[:, :2] * v[:, 2:]
    size = np.linalg.norm(a, axis=1)
    weight = focal * size / np.maximum(v[:, 2], 1e-6)  # pixels per unit of length
    ok = (v[:, 2] > 0) & (size > 1e-6)
    if ok.sum() < _LINKED:
        return np.nan, np.nan, int(ok.sum())
    lengths, weight = (a * c).sum(1)[ok] / size[ok] ** 2, weight[ok]
    middle = _weighted_median(lengths, weight)
    spread = _weighted_median(np.abs(lengths - middle), weight)
    return middle, spread / max(abs(middle), 1e-9), int(ok.sum())


def _refined(world: np.ndarray, rays: np.ndarray, rotation: np.ndarray, centre: np.ndarray, focal: float):
    """The pose from which points known in space are best seen where they are, from a pose near it."""
    camera = {"model": "SIMPLE_PINHOLE", "width": 2, "height": 2, "params": [1.0, 0.0, 0.0]}
    pose = poselib.CameraPose()
    pose.R, pose.t = rotation.T, -rotation.T @ centre
    bundle = {"loss_type": "CAUCHY", "loss_scale": 0.5 / focal}
    found, _ = poselib.refine_absolute_pose(rays[:, :2], world, pose, camera, bundle)
    r = np.asarray(found.R).T
    return r, -r @ np.asarray(found.t)


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])


def odometry(
    grey: UInt8[np.ndarray, "f h w"], camera: Float[np.ndarray, "4"], points: int = 500, still: float = 0.35
) -> Path:
    """The path of the camera through grey pictures.

    Args:
      camera: fx fy cx cy in pixels of the pictures, pixel centres at +0.5. points: tracked at a time.
      still: pixels that points move by (median), rotation taken out, up to which the camera stands.
    """
    count, focal = len(grey), float(camera[0])
    rotation, centre = np.tile(np.eye(3), (count, 1, 1)), np.zeros((count, 3))
    piece, moving, trust = np.zeros(count, np.int64), np.zeros(count, bool), np.zeros(count)
    trust[0], apart = 1.0, np.zeros(count)
    tracks = _Tracks()
    tracks.fill(grey[0], 0, points)
    for i in range(1, count):
        rotation[i], centre[i], piece[i] = rotation[i - 1], centre[i - 1], piece[i - 1]
        if len(tracks.now) >= _LEAST:
            before = tracks.now
            tracks.now, ok = track(grey[i - 1], grey[i], before)
            before = before[ok]
            tracks.keep(ok)
        else:
            before = tracks.now[:0]
            tracks.keep(np.zeros(len(tracks.now), bool))
        if len(before) >= _LEAST:
            a, b = bearings(before, camera), bearings(tracks.now, camera)
            r, left = rotation_between(a, b)
            if np.median(left) * focal < still:
                rotation[i] = rotation[i - 1] @ r.T
                trust[i] = float((left * focal < 3 * still).mean())
            else:
                moving[i] = True
                r, t, fits = _relative(a, b, focal)
                rotation[i] = rotation[i - 1] @ r.T
                step = -rotation[i] @ t
                trust[i] = float(fits.mean())
                known = fits & np.isfinite(tracks.world[:, 0])
                length, spread, used = _length(
                    tracks.world[known], b[known], rotation[i], centre[i - 1], step, focal
                )
                linked = used >= _LINKED and length > 0 and spread < 0.5
                if not linked:
                    piece[i] = piece[i - 1] + bool(moving[1:i].any())
                    length = 1.0
                    tracks.world[:], tracks.parallax[:] = np.nan, 0.0
                    stale = tracks.since < i - 1
                    tracks.first[stale], tracks.since[stale] = before[stale], i - 1
                centre[i] = centre[i - 1] + length * step
                if linked and used >= _LEAST:
                    refined = _refined(tracks.world[known], b[known], rotation[i], centre[i], focal)
                    apart[i] = _degrees(refined[0], rotation[i])
                    if apart[i] < _AGREED:
                        rotation[i], centre[i] = refined
                tracks.keep(fits)
                _place(tracks, rotation, centre, i, camera)
        tracks.fill(grey[i], i, points)
    c2w = np.tile(np.eye(4), (count, 1, 1))
    c2w[:, :3, :3], c2w[:, :3, 3] = _orthogonal(rotation), centre
    return Path(c2w, piece, moving, trust, apart)


def _place(tracks: _Tracks, rotation: np.ndarray, centre: np.ndarray, i: int, camera: np.ndarray) -> None:
    """Places points in space that are seen from far enough apart: now, and where they were first seen."""
    focal = float(camera[0])
    a, b = bearings(tracks.first, camera), bearings(tracks.now, camera)
    origin = centre[tracks.since]
    ra = np.einsum("nij,nj->ni", rotation[tracks.since], a)  # in world axes
    rb = b @ rotation[i].T
    turned = ra @ rotation[i]  # as the first ray would be seen now without a step
    apart = np.linalg.norm(turned[:, :2] / np.maximum(turned[:, 2:], 1e-6) - b[:, :2], axis=1) * focal
    base = centre[i] - origin
    # Depths p, q of origin + p ra = centre + q rb, in least squares.
    aa, bb, ab = (ra * ra).sum(1), (rb * rb).sum(1), (ra * rb).sum(1)
    det = aa * bb - ab**2
    ad, bd = (ra * base).sum(1), (rb * base).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        p, q = (bb * ad - ab * bd) / det, (ab * ad - aa * bd) / det
    ok = (det > 0) & (p > 0) & (q > 0) & (apart > np.maximum(_PARALLAX, _BETTER * tracks.parallax))
    place = (origin + p[:, None] * ra + centre[i] + q[:, None] * rb) / 2
    tracks.world[ok], tracks.parallax[ok] = place[ok], apart[ok]


def levelled(path: Path) -> Float64[np.ndarray, "f 4 4"]:
    """The poses in a world whose y points down and whose z is the first frame's heading.

    Down is what all the camera's right axes (it does not roll) and all its steps (the ground is flat) are across to,
    and where those leave it open, what is down in the pictures.
    """
    rotation, moved = path.c2w[:, :3, :3], np.diff(path.c2w[:, :3, 3], axis=0)
    size = np.linalg.norm(moved, axis=1)
    right, down = rotation[:, :, 0], rotation[:, :, 1].mean(0)
    steps = moved[size > 0] / size[size > 0, None]
    down /= np.linalg.norm(down)
    across = right.T @ right / len(right) + 1e-3 * (np.eye(3) - np.outer(down, down))
    if len(steps):
        across = across + 0.3 * steps.T @ steps / len(steps)
    y = np.linalg.eigh(across)[1][:, 0]
    y = y if y @ down > 0 else -y
    ahead = rotation[0, :, 2] - (rotation[0, :, 2] @ y) * y
    if np.linalg.norm(ahead) < 1e-6:
        return path.c2w
    z = ahead / np.linalg.norm(ahead)
    world = np.eye(4)
    world[:3, :3] = np.stack([np.cross(y, z), y, z])
    return world @ path.c2w


def _degrees(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.degrees(np.linalg.norm(a - b) / np.sqrt(2)))  # of small angles


def _orthogonal(rotation: Float64[np.ndarray, "f 3 3"]) -> Float64[np.ndarray, "f 3 3"]:
    """The nearest rotations: products of many drift by rounding."""
    u, _, vt = np.linalg.svd(rotation)
    return u @ vt
