"""Poses: the camera's path by visual odometry, and the rules by which it is believed (docs/curation.md)."""

import dataclasses

import numpy as np

from lingbot_jax.control.keyboard import STEP
from lingbot_jax.control.odometry import Path, agreed_focal, focal_lengths, levelled, odometry
from lingbot_jax.engine.curate.config import CurateConfig, PoseConfig
from lingbot_jax.engine.curate.frames import analysed, fit, grey_of
from lingbot_jax.engine.curate.items import Clip, Rejected

DISAGREE = 0.3  # degrees between the two rotations found for a frame
_SHARE = 0.05  # of the frames in which they may disagree
_SURE, _UNSURE = (
    0.15,
    0.4,
)  # spread of focal lengths up to which one is estimated; up to which it is taken at all
_CLIPS = 6  # of a video, evenly spread, that its focal length is read from


def pose(config: CurateConfig, clip: Clip) -> Clip:
    """The longest stretch of the clip whose path can be believed, with this path and the focal length.

    Raises:
      Rejected: it is too short; the reason is what most of the clip's frames are lost to.
    """
    if clip.notes["camera"]["focal"] is None:
        raise Rejected("focal length unknown", f"spread {clip.notes['camera']['spread']:.2f}")
    grey = grey_of(analysed(clip, config.pose.width, config.size))
    path = odometry(grey, _inside(config, clip, grey), config.pose.points, config.pose.still)
    broken = faults(config.pose, path)
    begin, end = believed(broken, path.apart > DISAGREE)
    if end - begin < config.split.min_frames:
        raise Rejected(*_why(path, broken, clip.frames))
    own = scaled(Path(*(part[begin:end] for part in path)))
    c2w = levelled(own)
    turns = np.swapaxes(c2w[:-1, :3, :3], 1, 2) @ c2w[1:, :3, :3]
    angle = np.degrees(np.arccos(np.clip((np.trace(turns, axis1=1, axis2=2) - 1) / 2, -1, 1)))
    pieces = len(set(own.piece[1:][own.moving[1:]]))
    apart = float((own.apart[1:] > DISAGREE).mean())
    findings = {
        "c2w": [[round(float(x), 9) for x in row[:3].ravel()] for row in c2w],
        "focal": clip.notes["camera"]["focal"],
        "intrinsics": clip.notes["camera"]["known"],
        "confidence": round(min(float(own.trust[1:].min()), 1 - 10 * apart), 3),
        "scale": "still" if not pieces else "one" if pieces == 1 else "unknown",
        "moving": round(float(own.moving[1:].mean()), 3),
        "turning": round(float(angle.mean()), 4),
    }
    cut = dataclasses.replace(clip, start=clip.start + begin / clip.fps, frames=end - begin)
    return cut.noted("pose", findings)


def poses_of(clip: Clip) -> np.ndarray:
    """The path that `pose` has noted: camera-to-world, [f 4 4]."""
    c2w = np.tile(np.eye(4), (clip.frames, 1, 1))
    c2w[:, :3] = np.array(clip.notes["pose"]["c2w"]).reshape(-1, 3, 4)
    return c2w


def faults(config: PoseConfig, path: Path) -> dict[str, np.ndarray]:
    """Reason -> steps (into frames) that no stretch may hold."""
    changed = np.diff(path.piece, prepend=path.piece[0]) != 0
    return {
        "untrackable": path.trust == 0,
        "tracks disagree": (path.trust > 0) & (path.trust < config.min_confidence),
        "scale unknown": changed & (not config.unscaled),
    }


def believed(broken: dict[str, np.ndarray], apart: np.ndarray) -> tuple[int, int]:
    """The longest range of frames, the first one of several, inside which no step is broken and the two rotations of a
    frame disagree in at most a twentieth."""
    bad, count = np.any(list(broken.values()), axis=0), len(apart)
    before = lambda x: np.concatenate([[0], np.cumsum(x)])
    bads, aparts = before(bad), before(apart)
    for length in range(count, 1, -1):
        first = np.arange(count - length + 1)
        steps = (first + 1, first + length)  # into all frames but the first
        fits = bads[steps[1]] == bads[steps[0]]
        fits &= aparts[steps[1]] - aparts[steps[0]] <= _SHARE * (length - 1)
        if fits.any():
            return int(first[fits][0]), int(first[fits][0]) + length
    return 0, 0


def _why(path: Path, broken: dict[str, np.ndarray], count: int) -> tuple[str, str]:
    """The reason with the most frames, and how many."""
    frames = {reason: int(steps.sum()) for reason, steps in broken.items()}
    frames["rotations disagree"] = int((path.apart > DISAGREE).sum())
    reason = max(frames, key=frames.get)
    return reason, ", ".join(f"{k} in {v} of {count} frames" for k, v in frames.items() if v)


def camera(config: CurateConfig, clips: list[Clip]) -> list[Clip]:
    """The clips of a video with its focal length in widths of the picture shown: one for all, as most do not zoom."""
    if config.pose.focal is not None:
        return [clip.noted("camera", {"focal": config.pose.focal, "known": "given"}) for clip in clips]
    told = []
    for i in sorted(set(np.linspace(0, len(clips) - 1, _CLIPS).astype(int))) if clips else ():
        grey = grey_of(analysed(clips[i], config.pose.width, config.size))
        told += [focal / _whole(clips[i], config.size) for focal in focal_lengths(grey)]
    focal, spread = agreed_focal(told)
    if spread > _UNSURE:
        focal = config.pose.assumed_focal
    known = "estimated" if spread <= _SURE else "uncertain" if spread <= _UNSURE else "assumed"
    note = {"focal": focal, "known": known, "pairs": len(told), "spread": min(spread, 99.0)}
    return [clip.noted("camera", note) for clip in clips]


def _inside(config: CurateConfig, clip: Clip, grey: np.ndarray) -> np.ndarray:
    """fx fy cx cy in pixels of the pictures looked at."""
    height, width = grey.shape[1:]
    stored = intrinsics(config, clip, clip.notes["camera"]["focal"]).astype(np.float64)
    return (
        stored * np.array([width, width, width, height]) / np.array([config.size[1]] * 3 + [config.size[0]])
    )


def intrinsics(config: CurateConfig, clip: Clip, focal: float) -> np.ndarray:
    """fx fy cx cy in pixels of the stored frame, of `focal` in widths of the picture shown, whose middle is the
    principal point."""
    (height, width), (top, left) = fit(clip.video, clip.box, config.size)
    inside = clip.box[3] - clip.box[2], clip.box[1] - clip.box[0]
    middle = (0.5 - clip.box[2]) / inside[0] * width - left, (0.5 - clip.box[0]) / inside[1] * height - top
    return np.array([focal * width / inside[0]] * 2 + [*middle], np.float32)


def _whole(clip: Clip, size: tuple[int, int]) -> float:
    """Widths of the cut per width of what is inside the box: more than 1 where the sides are cut off."""
    return fit(clip.video, clip.box, size)[0][1] / size[1]


def scaled(path: Path) -> Path:
    """The path with the usual step of every piece at `keyboard.STEP` world units."""
    moved = np.diff(path.c2w[:, :3, 3], axis=0, prepend=path.c2w[:1, :3, 3])
    size = np.linalg.norm(moved, axis=1)
    for piece in range(int(path.piece.max()) + 1):
        own = (path.piece == piece) & path.moving & (size > 0)
        if own.any():
            moved[own] *= STEP / np.median(size[own])
    c2w = path.c2w.copy()
    c2w[:, :3, 3] = np.cumsum(moved, axis=0)
    return path._replace(c2w=c2w)
