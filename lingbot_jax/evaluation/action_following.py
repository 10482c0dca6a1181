"""Action following: whether a generated world moves as the keys say, seen in its pixels alone.

Turning moves the whole picture, whatever is in it: its median optical flow gives yaw and pitch. A step aside moves it
as well, so where the path has one, yaw is not looked at.
"""

from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from lingbot_jax.control.keyboard import KEYS, elevation, headings

WIDTH = 128  # pixels that a picture is scaled to: the search's patches of 8 pixels suit more than 100
LEAST = 0.5  # degrees per frame that a camera must turn for the direction of a span to count
FOLLOWED = 0.1  # part of a commanded turn that must be seen: what stands still follows nothing


def dense_flow(video: UInt8[np.ndarray, "f h w 3"]) -> Iterator[Float[np.ndarray, "hl wl 2"]]:
    """Optical flow into each frame but the first, in pixels of the video (right and down are positive), at every pixel
    of a picture `WIDTH` wide: by dense inverse search."""
    scale = WIDTH / video.shape[2]
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    small = (cv2.resize(x, None, fx=scale, fy=scale, interpolation=how) for x in video)
    grey = [cv2.cvtColor(x, cv2.COLOR_RGB2GRAY) for x in small]
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return (search.calc(a, b, None) / scale for a, b in zip(grey, grey[1:], strict=False))


def median_flow(video: UInt8[np.ndarray, "f h w 3"]) -> Float[np.ndarray, "f 2"]:
    """Median optical flow into each frame, in pixels (right and down are positive); 0 for frame 0."""
    return np.array([np.zeros(2), *(np.median(flow, axis=(0, 1)) for flow in dense_flow(video))])


def yaw_signs(
    video: UInt8[np.ndarray, "f h w 3"], keys: UInt8[np.ndarray, "f 8"], span: int = 4
) -> tuple[int, int]:
    """Counts spans of frames where the picture moves as the turning key says: (agreeing, all).

    Turning left (J) moves the picture to the right. Spans with both keys, neither, or a sideways step (A, D),
    which moves the picture too, are left out.
    """
    held = {name: keys[:, i].astype(bool) for i, name in enumerate(KEYS)}
    flow = median_flow(video)[:, 0]
    agree = total = 0
    for start in range(1, len(video) - span + 1, span):
        part = slice(start, start + span)
        left, right = held["J"][part].all(), held["L"][part].all()
        if left == right or held["A"][part].any() or held["D"][part].any():
            continue
        total += 1
        agree += (flow[part].sum() > 0) == left
    return agree, total


class Turns(NamedTuple):
    """How a camera turns into each frame; 0 for frame 0.

    Attributes:
      degrees: yaw (right is positive) and pitch (up is positive).
      steady: whether the turn can be read off the picture: without a step aside for yaw, always for pitch.
    """

    degrees: Float[np.ndarray, "f 2"]
    steady: Bool[np.ndarray, "f 2"]


def commanded_turns(c2w: Float[np.ndarray, "f 4 4"]) -> Turns:
    """Of a camera's path, camera to world. Keys give one by `keyboard.integrate`."""
    c2w = np.asarray(c2w, np.float64)
    forward, right = headings(c2w[:, :3, :3])
    heading = np.degrees(np.arctan2(forward[:, 0], forward[:, 2]))
    yaw = (np.diff(heading, prepend=heading[:1]) + 180) % 360 - 180
    angle = np.degrees(elevation(c2w[:, :3, :3]))
    pitch = np.diff(angle, prepend=angle[:1])
    moved = np.diff(c2w[:, :3, 3], axis=0, prepend=c2w[:1, :3, 3])
    aside, whole = np.abs((moved * right).sum(-1)), np.linalg.norm(moved, axis=-1).max()
    steady = aside <= 0.1 * whole + 1e-6
    return Turns(np.stack([yaw, pitch], -1), np.stack([steady, np.ones_like(steady)], -1))


def recovered_turns(
    video: UInt8[np.ndarray, "f h w 3"], intrinsics: Float[np.ndarray, "4"]
) -> Float[np.ndarray, "f 2"]:
    """Yaw and pitch in degrees into each frame, seen in the picture; 0 for frame 0.

    Args:
      intrinsics: fx fy cx cy in pixels of the video.
    """
    height, width = video.shape[1:3]
    found = [np.zeros(2)]
    for flow in dense_flow(video):
        y, x = (
            (np.arange(n) + 0.5) * size / n for n, size in zip(flow.shape[:2], (height, width), strict=True)
        )
        # A pixel off the middle moves 1 + tan^2 of its angle as far.
        place = np.stack(np.broadcast_arrays(x, y[:, None]), -1)
        tangent = (place - intrinsics[2:]) / intrinsics[:2]
        found.append(np.median(flow / (1 + tangent**2), axis=(0, 1)))
    # A camera that turns right sees the picture move left; one that looks up sees it move down.
    return np.degrees(np.array(found) / intrinsics[:2]) * [-1, 1]


class Following(NamedTuple):
    """How a set of videos follows what was commanded, over spans of frames.

    Attributes:
      yaw_agreement, pitch_agreement: share of the spans with a turn in which the picture turns the same way, and at
        least a tenth as far; NaN without such a span. Chance is below a half; what stands still has 0.
      yaw_correlation, pitch_correlation: of the angles of all spans; 0 where nothing moves, NaN where nothing was
        commanded.
      correlation: of all angles, yaw and pitch, about zero (their scales are the same, and both ways are as likely).
      spans: with a turn.
    """

    yaw_agreement: float
    pitch_agreement: float
    yaw_correlation: float
    pitch_correlation: float
    correlation: float
    spans: int


def _correlation(ours: np.ndarray, commanded: np.ndarray) -> float:
    size = np.sqrt(np.square(ours).sum() * np.square(commanded).sum())
    if not np.square(commanded).sum() > 0:
        return float("nan")
    return float((ours * commanded).sum() / size) if size > 0 else 0.0


def follow(
    videos: UInt8[np.ndarray, "b f h w 3"],
    c2w: Float[np.ndarray, "b f 4 4"],
    intrinsics: Float[np.ndarray, "b 4"],
    start: int = 1,
    span: int = 4,
) -> Following:
    """Compares how the picture turns with how the camera was told to.

    Args:
      c2w: commanded paths; for play `keyboard.integrate(keys)`. intrinsics: fx fy cx cy in pixels of the videos.
      start: first frame that counts, at least 1: turns are from the frame before. span: frames compared at a time.

    Raises:
      ValueError: videos shorter than a span.
    """
    count = (videos.shape[1] - start) // span
    if count < 1:
        raise ValueError(f"videos of {videos.shape[1]} frames: a span of {span} does not fit behind {start}")
    part = slice(start, start + count * span)
    cut = lambda x: x[part].reshape(count, span, 2)
    ours, told, steady = [], [], []
    for video, path, own in zip(videos, c2w, intrinsics, strict=True):
        turns = commanded_turns(path)
        ours.append(cut(recovered_turns(video, own)).sum(1))
        told.append(cut(turns.degrees).sum(1))
        steady.append(cut(turns.steady).all(1))
    ours, told, steady = (np.concatenate(x) for x in (ours, told, steady))
    turning = steady & (np.abs(told) >= LEAST * span)
    agree = ours * told >= FOLLOWED * np.square(told)
    shares = [
        float(agree[:, i][turning[:, i]].mean()) if turning[:, i].any() else float("nan") for i in (0, 1)
    ]
    each = [_correlation(ours[:, i][steady[:, i]], told[:, i][steady[:, i]]) for i in (0, 1)]
    return Following(*shares, *each, _correlation(ours[steady], told[steady]), int(turning.sum()))
