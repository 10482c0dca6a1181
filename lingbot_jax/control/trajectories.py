"""Procedural camera paths and import of recorded ones (paper section 2.1.3).

Geometric patterns (rectangles of varying scale, several 360 degree turns at varying speed) and multi-point
interpolation (way-points with look-back) revisit what they have seen: they teach spatial memory. Imported
paths bring the jitter and the pauses of a hand. Every function draws from a NumPy Generator and returns a
`Path`; `collision_free` redraws until a scene accepts one.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

from lingbot_jax.config import ConfigError, require
from lingbot_jax.control import keyboard, poses
from lingbot_jax.control.keyboard import DEGREES, STEP


class Path(NamedTuple):
    """One trajectory: a pose per video frame, and the keys held in the transition into each (row 0 empty)."""

    c2w: Float64[np.ndarray, "f 4 4"]
    keys: Bool[np.ndarray, "f 8"]


def rectangle(
    rng: np.random.Generator,
    frames: int,
    start: Float64[np.ndarray, "4 4"] | None = None,
    sides: tuple[float, float] = (0.5, 3.0),
    step: float = STEP,
    degrees: float = DEGREES,
) -> Path:
    """Walks round a random rectangle, to the left or to the right, until the frames are used up.

    Each lap ends exactly where it began. The path is `keyboard.integrate` of its keys: W along the sides, J or
    L at the corners.

    Args:
      start: pose of frame 0, a corner looking along the first side; level.
      sides: shortest and longest side, world units. step: world units per frame.
      degrees: about so many per frame; rounded so that a corner takes whole frames.
    """
    _check(frames, step=step, degrees=degrees)
    low, high = _range("sides", sides)
    walks = np.maximum(1, np.round(rng.uniform(low, high, size=2) / step)).astype(int)
    corner = max(1, round(90 / degrees))
    turn = rng.choice(["j", "l"])
    lap = keyboard.parse(",".join(f"w-{n},{turn}-{corner}" for n in walks))[1:]
    keys = np.resize(np.tile(lap, (2, 1)), (frames, len(keyboard.KEYS)))
    keys = np.concatenate([np.zeros_like(keys[:1]), keys[:-1]])
    return Path(keyboard.integrate(keys, start, step, 90 / corner), keys)


def turns(
    rng: np.random.Generator,
    frames: int,
    start: Float64[np.ndarray, "4 4"] | None = None,
    count: tuple[int, int] = (1, 3),
    variation: float = 0.6,
) -> Path:
    """Turns on the spot through whole circles, faster and slower; the last pose equals the first.

    Args:
      start: pose of frame 0. count: fewest and most circles.
      variation: in [0, 1): the speed swings by this part of its mean, smoothly.
    """
    _check(frames)
    require(1 <= count[0] <= count[1], "count", count, "must be two whole numbers, 1 or more, in order")
    require(0 <= variation < 1, "variation", variation, "must lie in [0, 1)")
    circles = int(rng.integers(count[0], count[1], endpoint=True)) * int(rng.choice([-1, 1]))
    time = np.linspace(0, 1, frames)
    # Time plus sines that vanish at both ends; their slope is at most `variation`, so the turn never stops.
    waves = np.arange(1, 4)
    weights = rng.dirichlet(np.ones(len(waves)))[:, None] * np.sign(rng.uniform(-1, 1, (len(waves), 1)))
    swing = np.sum(weights * np.sin(2 * np.pi * waves[:, None] * time) / (2 * np.pi * waves[:, None]), axis=0)
    yaw = 2 * np.pi * circles * (time + variation * swing)
    mean = 360 * abs(circles) / max(frames - 1, 1)
    require(
        frames == 1 or mean * (1 + variation) <= 90, "frames", frames, f"too few for {abs(circles)} circles"
    )
    return _path(start, np.zeros((frames, 3)), yaw, STEP, mean * (1 - variation))


def waypoints(
    rng: np.random.Generator,
    frames: int,
    start: Float64[np.ndarray, "4 4"] | None = None,
    extent: float = 2.0,
    step: float = STEP,
    degrees: float = DEGREES,
) -> Path:
    """Walks from one random way-point to the next, and at each looks back at the one it came from.

    The camera faces where it goes; at a way-point it turns round until it faces the last one, then on to the
    next, until the frames are used up.

    Args:
      start: pose of frame 0, the first way-point. extent: way-points lie within so many world units of it.
      step: world units per frame. degrees: of turning per frame.
    """
    _check(frames, extent=extent, step=step, degrees=degrees)
    knots = [(0.0, 0.0, 0.0, 0.0)]  # frame, x, z, yaw in degrees; between knots everything is linear
    while knots[-1][0] < frames - 1:
        frame, x, z, yaw = knots[-1]
        radius, angle = extent * np.sqrt(rng.uniform()), rng.uniform(0, 2 * np.pi)
        to_x, to_z = radius * np.sin(angle), radius * np.cos(angle)
        distance = np.hypot(to_x - x, to_z - z)
        # A nearer one has no direction to look back along (and the loop must advance).
        if distance < max(step, extent / 4):
            continue
        facing = np.degrees(np.arctan2(to_x - x, to_z - z))
        facing = yaw + (facing - yaw + 180) % 360 - 180
        frame += abs(facing - yaw) / degrees
        knots.append((frame, x, z, facing))
        frame += distance / step
        knots.append((frame, to_x, to_z, facing))
        back = facing + 180 * rng.choice([-1, 1])
        knots.append((frame + 180 / degrees, to_x, to_z, back))
    times, xs, zs, yaws = np.array(knots).T
    x, z, yaw = (np.interp(np.arange(frames), times, values) for values in (xs, zs, yaws))
    return _path(start, np.stack([x, np.zeros(frames), z], axis=-1), np.radians(yaw), step, degrees)


PROCEDURAL: dict[str, Callable[..., Path]] = {
    "rectangle": rectangle,
    "turns": turns,
    "waypoints": waypoints,
}


def recorded(
    c2w: Float64[np.ndarray, "n 4 4"],
    frames: int,
    start: Float64[np.ndarray, "4 4"] | None = None,
    timestamps: Float64[np.ndarray, "n"] | None = None,
    reach: float | None = None,
    degrees: float = DEGREES,
) -> Path:
    """Brings a recorded path into a scene: from `start`, at `frames` equal time steps, scaled as a whole.

    Nothing is smoothed: jitter, pauses and changes of speed stay. The recording is moved and turned about the
    vertical so that it begins at the position and heading of `start`; its own tilt stays, so its world must
    have y pointing down (gravity).

    Args:
      c2w: recorded camera-to-world poses, OpenCV axes. timestamps: seconds, increasing; None: equal steps.
      reach: world units between the start and the farthest point of the result; None keeps the scale.
      degrees: turning per frame that counts as holding a key (half of it is the threshold). A movement key
        counts as held above half of the median displacement per frame, among the frames that move.

    Raises:
      ConfigError: poses that are not rigid, timestamps that do not increase, or reach for a path that stays.
    """
    _check(frames, degrees=degrees)
    c2w = poses.validate(c2w, "recording")
    n = len(c2w)
    at = np.linspace(0, n - 1, frames)
    if timestamps is not None:
        times = np.asarray(timestamps, np.float64)
        if times.shape != (n,) or not (np.diff(times) > 0).all():
            raise ConfigError(
                f"timestamps of shape {times.shape}: must be {n} increasing numbers, one a pose"
            )
        at = np.interp(np.linspace(times[0], times[-1], frames), times, np.arange(n))
    path = poses.interpolate(c2w, at)
    offsets = path[:, :3, 3] - c2w[0, :3, 3]
    if reach is not None:
        farthest = np.linalg.norm(offsets, axis=-1).max()
        require(reach > 0, "reach", reach, "must be positive")
        require(bool(farthest > 0), "reach", reach, "cannot scale a recording that never moves; use None")
        offsets = offsets * (reach / farthest)
    start = np.eye(4) if start is None else start
    turn = keyboard.rotation_y(_heading(start) - _heading(c2w[0]))
    out = np.tile(np.eye(4), (frames, 1, 1))
    out[:, :3, :3] = turn @ path[:, :3, :3]
    out[:, :3, 3] = start[:3, 3] + offsets @ turn.T
    moved = np.linalg.norm(np.diff(out[:, :3, 3], axis=0), axis=-1)
    moved = moved[moved > 1e-9]
    move = np.median(moved) / 2 if moved.size else STEP / 2
    return Path(out, keyboard.keys_from_poses(out, float(move), degrees / 2, degrees / 2))


def collision_free(
    draw: Callable[[], Path], free: Callable[[Float64[np.ndarray, "f 4 4"]], bool], attempts: int = 100
) -> Path:
    """The first path that the scene accepts, e.g. `collision_free(lambda: turns(rng, 81), scene.free)`.

    Args:
      draw: a new random path at every call. free: True if the whole trajectory is clear of obstacles.

    Raises:
      ConfigError: none of `attempts` paths is free.
    """
    for _ in range(attempts):
        path = draw()
        if free(path.c2w):
            return path
    raise ConfigError(
        f"attempts = {attempts}: no path is free of collisions; use shorter paths or another start"
    )


def _heading(c2w: Float64[np.ndarray, "4 4"]) -> float:
    """Angle of the view about the vertical, radians to the right of +z."""
    forward = keyboard.headings(c2w[None, :3, :3])[0][0]
    return float(np.arctan2(forward[0], forward[2]))


def _path(
    start: Float64[np.ndarray, "4 4"] | None,
    offsets: np.ndarray,
    yaw: np.ndarray,
    step: float,
    degrees: float,
) -> Path:
    """Poses from offsets [f 3] in the heading frame of `start` and turns [f] (radians) since then."""
    start = np.eye(4) if start is None else start
    c2w = np.tile(np.eye(4), (len(yaw), 1, 1))
    c2w[:, :3, :3] = keyboard.rotation_y(yaw) @ start[:3, :3]
    c2w[:, :3, 3] = start[:3, 3] + offsets @ keyboard.rotation_y(_heading(start)).T
    return Path(c2w, keyboard.keys_from_poses(c2w, step / 2, degrees / 2, degrees / 2))


def _check(frames: int, **positive: float) -> None:
    require(frames >= 1, "frames", frames, "must be at least 1")
    for name, value in positive.items():
        require(bool(np.isfinite(value) and value > 0), name, value, "must be positive")


def _range(name: str, value: tuple[float, float]) -> tuple[float, float]:
    require(0 < value[0] <= value[1], name, value, "must be two positive numbers in order")
    return value
