"""Keys to camera poses and back (docs/control.md; paper section 3.3.2).

A keyboard recording is `keys [f 8]`, one column per key of `KEYS`. Row i holds the keys that were down during
the transition from frame i-1 into frame i; row 0 has no transition and is ignored. Poses are camera-to-world,
OpenCV axes: x right, y down, z forward; the ground is the plane of world x and z.

    W S  forward, back           I K  look up, down
    A D  left, right             J L  turn left, right

One transition rotates first, R' = Ry(yaw) R Rx(pitch), and then moves along the new heading on the ground, so
looking up or down changes neither speed nor height. Two movement keys add up (W and D: sqrt(2) steps);
opposite keys cancel.
"""

import itertools
import re

import numpy as np
from jaxtyping import Bool, Float64, Shaped

from lingbot_jax.config import ConfigError, require

KEYS = ("W", "A", "S", "D", "I", "J", "K", "L")
MOVEMENT = KEYS[:4]  # the columns that action control carries; looking is carried by the rays
STEP = 0.05  # world units per video frame
DEGREES = 2.0  # per video frame, for yaw and for pitch
PITCH_LIMIT = 85.0  # degrees above and below the horizon
MAX_FRAMES = 1_000_000  # of a text: far above any use, far below what would exhaust memory

_W, _A, _S, _D, _I, _J, _K, _L = range(8)


def parse(text: str) -> Bool[np.ndarray, "f 8"]:
    """Reads the text form `w-20,wl-12,none-8`: comma-separated `<keys>-<frames>`.

    Case and white space do not matter. The frames count transitions, so `w-20` walks exactly 20 steps and has
    f = 21 rows, the first one empty.

    Raises:
      ConfigError: names the character (from 1), the token and what is allowed.
    """
    rows = [np.zeros((1, len(KEYS)), bool)]
    total, start = 0, 0
    for token in text.split(","):
        where = f"keys text, character {start + len(token) - len(token.lstrip()) + 1}"
        start += len(token) + 1
        token = token.strip()
        pressed, frames = _parse_token(token, where)
        total += frames
        require(total <= MAX_FRAMES, where, token, f"together more than {MAX_FRAMES} frames; use fewer")
        rows.append(np.repeat(pressed[None], frames, axis=0))
    return np.concatenate(rows)


def _parse_token(token: str, where: str) -> tuple[Bool[np.ndarray, "8"], int]:
    """One `<keys>-<frames>`; `where` opens the error message."""
    shape = re.fullmatch(r"([A-Za-z]+)\s*-\s*([0-9]{1,9})", token)
    require(
        shape is not None,
        where,
        token,
        "expected <keys>-<frames> such as w-20, wl-12 or none-8 (commas between)",
    )
    letters, frames = shape[1].upper(), int(shape[2])
    require(frames > 0, where, token, "the number of frames must be at least 1")
    pressed = np.zeros(len(KEYS), bool)
    if letters == "NONE":
        return pressed, frames
    for letter in letters:
        require(letter in KEYS, where, token, f"unknown key {letter!r}; allowed: {' '.join(KEYS)} or none")
        require(not bool(pressed[KEYS.index(letter)]), where, token, f"key {letter!r} is named twice")
        pressed[KEYS.index(letter)] = True
    return pressed, frames


def to_text(keys: Shaped[np.ndarray, "f 8"]) -> str:
    """The text form of rows 1.. of `keys`; `parse` gives the same keys back (with an empty row 0).

    Raises:
      ConfigError: there is no transition to write (f < 2).
    """
    keys = np.asarray(keys).astype(bool)
    require(
        len(keys) >= 2, "keys", f"{len(keys)} rows", "need at least 2: row 0 is the start, not a transition"
    )
    tokens = []
    for row, run in itertools.groupby(map(tuple, keys[1:])):
        names = "".join(k for k, down in zip(KEYS, row, strict=True) if down).lower()
        tokens.append(f"{names or 'none'}-{len(list(run))}")
    return ",".join(tokens)


def integrate(
    keys: Shaped[np.ndarray, "f 8"],
    start: Shaped[np.ndarray, "4 4"] | None = None,
    step: float = STEP,
    yaw_degrees: float = DEGREES,
    pitch_degrees: float = DEGREES,
    pitch_limit: float = PITCH_LIMIT,
) -> Float64[np.ndarray, "f 4 4"]:
    """Camera-to-world pose at every frame; pose 0 is `start` (the identity by default).

    A pitch step that would pass `pitch_limit` degrees from the horizon is not made at all, as in the
    published code (with the defaults the camera stops at 84 degrees). A start beyond it can only come back.
    Walking on from the last pose gives the same path as one long walk: chunks need no other state.

    Args:
      keys: non-zero = down. Row i acts on the transition into frame i; row 0 is ignored.
      start: pose of frame 0. It should stand level (no roll): with roll, the limit is that of the tracked
        angle, not of the view.
      step: world units per frame. yaw_degrees, pitch_degrees: per frame.
    """
    down = np.asarray(keys).astype(bool).astype(np.int64)
    down[:1] = 0
    start = np.eye(4) if start is None else np.asarray(start, np.float64)
    yaw = np.radians(yaw_degrees) * np.cumsum(down[:, _L] - down[:, _J])
    pitch = np.radians(pitch_degrees) * _limited(
        down[:, _I] - down[:, _K], np.degrees(elevation(start[None, :3, :3])[0]), pitch_degrees, pitch_limit
    )
    # Left factors turn about the same world axis and right factors about the same camera axis, so the product
    # of all transitions is one turn on each side: no drift, however long the walk.
    rotation = rotation_y(yaw) @ start[:3, :3] @ rotation_x(pitch)
    forward, right = headings(rotation)
    ahead, aside = down[:, _W] - down[:, _S], down[:, _D] - down[:, _A]
    moves = step * (ahead[:, None] * forward + aside[:, None] * right)
    c2w = np.tile(np.eye(4), (len(down), 1, 1))
    c2w[:, :3, :3] = rotation
    c2w[:, :3, 3] = start[:3, 3] + np.cumsum(moves, axis=0)
    return c2w


def _limited(steps: np.ndarray, begin: float, size: float, limit: float) -> np.ndarray:
    """Running count of those pitch steps (-1, 0, 1) that stay within the limit or lead back to it."""
    counts = np.zeros(len(steps), np.int64)
    count, slack = 0, 1e-6  # degrees: reading the angle back from a pose costs some 1e-13
    for i, s in enumerate(steps):
        if s and abs(begin + (count + s) * size) <= max(limit, abs(begin + count * size)) + slack:
            count += s
        counts[i] = count
    return counts


def keys_from_poses(
    c2w: Float64[np.ndarray, "f 4 4"],
    move: float = STEP / 2,
    yaw_degrees: float = DEGREES / 2,
    pitch_degrees: float = DEGREES / 2,
) -> Bool[np.ndarray, "f 8"]:
    """The keys that explain a path: the inverse of `integrate`, and labels for recorded poses.

    A key is down when the camera moved along its direction by more than the threshold: the displacement since
    the previous frame, measured along this frame's heading on the ground (W S) and across it (D A), and the
    change of heading (L J) and of elevation (I K). The default thresholds are half of `integrate`'s steps;
    for recorded poses take half of the usual displacement per frame, in the recording's own unit.

    On a path of `integrate` the result is exact, except that keys without effect (opposite keys, pitch at its
    limit) are not down; integrating the result gives the path again. Height changes and roll have no key.

    Args:
      c2w: camera-to-world poses. move: world units per frame. yaw_degrees, pitch_degrees: per frame.
    """
    ahead, aside, yaw, pitch = motions(c2w)
    keys = np.zeros((len(c2w), len(KEYS)), bool)
    for value, threshold, plus, minus in (
        (ahead, move, _W, _S),
        (aside, move, _D, _A),
        (yaw, yaw_degrees, _L, _J),
        (pitch, pitch_degrees, _I, _K),
    ):
        keys[:, plus], keys[:, minus] = value > threshold, value < -threshold
    return keys


def motions(c2w: Float64[np.ndarray, "f 4 4"]) -> tuple[Float64[np.ndarray, "f"], ...]:
    """Of every frame since the one before: how far ahead and aside, in world units, and degrees of yaw and of pitch."""
    rotation = c2w[:, :3, :3]
    forward, right = headings(rotation)
    moved = np.diff(c2w[:, :3, 3], axis=0, prepend=c2w[:1, :3, 3])
    ahead, aside = (np.sum(moved * axis, axis=-1) for axis in (forward, right))
    heading = np.degrees(np.arctan2(forward[:, 0], forward[:, 2]))
    yaw = (np.diff(heading, prepend=heading[:1]) + 180) % 360 - 180
    angle = np.degrees(elevation(rotation))
    return ahead, aside, yaw, np.diff(angle, prepend=angle[:1])


def rotation_x(angle: np.ndarray | float) -> np.ndarray:
    """Rotations [... 3 3] about x, radians; positive looks up (forward turns to -y)."""
    return _rotation(angle, 1, 2)


def rotation_y(angle: np.ndarray | float) -> np.ndarray:
    """Rotations [... 3 3] about y, radians; positive turns right (forward turns to +x)."""
    return _rotation(angle, 2, 0)


def _rotation(angle: np.ndarray | float, a: int, b: int) -> np.ndarray:
    """Right-handed rotation in the plane of axes (a, b)."""
    angle = np.asarray(angle, np.float64)
    out = np.zeros((*angle.shape, 3, 3))
    out[..., range(3), range(3)] = 1.0
    out[..., a, a] = out[..., b, b] = np.cos(angle)
    out[..., b, a] = np.sin(angle)
    out[..., a, b] = -out[..., b, a]
    return out


def elevation(rotation: Float64[np.ndarray, "f 3 3"]) -> Float64[np.ndarray, "f"]:
    """Angle of the view above the horizon, radians (y points down)."""
    return np.arcsin(np.clip(-rotation[:, 1, 2], -1.0, 1.0))


def headings(
    rotation: Float64[np.ndarray, "f 3 3"],
) -> tuple[Float64[np.ndarray, "f 3"], Float64[np.ndarray, "f 3"]]:
    """Unit forward and right directions on the ground; zero where the axis is vertical."""
    flat = rotation[:, :, [2, 0]] * np.array([1.0, 0.0, 1.0])[:, None]
    norm = np.linalg.norm(flat, axis=1, keepdims=True)
    flat = np.where(norm > 1e-9, flat / np.maximum(norm, 1e-9), 0.0)
    return flat[..., 0], flat[..., 1]


def check(keys: object, field: str = "keys") -> Bool[np.ndarray, "f 8"]:
    """`keys` as bool [f 8], from anything array-like of 0 and 1.

    Raises:
      ConfigError: wrong shape or a value that is neither 0 nor 1.
    """
    array = np.asarray(keys)
    if array.ndim != 2 or array.shape[1] != len(KEYS) or not len(array):
        raise ConfigError(
            f"{field} has shape {array.shape}: must be [frames {len(KEYS)}], columns {' '.join(KEYS)}"
        )
    bad = np.argwhere((array != 0) & (array != 1))
    if len(bad):
        frame, key = bad[0]
        raise ConfigError(f"{field}[{frame}].{KEYS[key]} = {array[frame, key]!r}: must be 0 or 1")
    return array.astype(bool)
