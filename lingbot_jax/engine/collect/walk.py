"""Keys to poses inside a game world with walls: the kinematics that behaviours plan with.

Positions are the game's own: x east, y north, z up (floor height), in map units; `angle` is counter-clockwise
from east, in degrees. One transition turns first and then moves along the new heading, W and D together are
both added, and opposite keys cancel, exactly as `control/keyboard.py` integrates keys. A move that does not fit
is refused as a whole (no sliding): the player turns but stays, and the keys are recorded all the same.
"""

import dataclasses
import math
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import UInt8

KEYS = "WASDIJKL"
Keys = UInt8[np.ndarray, "n 8"]


class Pose(NamedTuple):
    x: float
    y: float
    z: float
    angle: float  # degrees, counter-clockwise from east


class Spot(NamedTuple):
    """A place of interest: a door to walk through along `angle`, or a landmark (angle unused)."""

    x: float
    y: float
    angle: float = 0.0


class World(Protocol):
    """What a behaviour may ask about the map it is in."""

    doors: tuple[Spot, ...]  # empty if unknown
    landmarks: tuple[Spot, ...]  # solid things with free floor around them; empty if none

    def enter(self, x: float, y: float) -> float | None:
        """Floor height for a player standing at (x, y), or None if there is no room for one."""

    def move(self, start: Pose, x: float, y: float) -> float | None:
        """Floor height at (x, y) if a player can step there from `start`, else None."""

    def spawn(self, rng: np.random.Generator) -> tuple[float, float]:
        """A random point, likely but not certainly free."""


def row(keys: str) -> np.ndarray:
    """One transition: row("WJ") walks while turning left."""
    return np.array([k in keys for k in KEYS], np.uint8)


def hold(keys: str, frames: int) -> Keys:
    return np.tile(row(keys), (frames, 1))


@dataclasses.dataclass(frozen=True)
class Walker:
    """Moves poses through a world: `step` map units and `yaw` degrees a frame."""

    world: World
    step: float
    yaw: float

    def advance(self, pose: Pose, keys: np.ndarray) -> tuple[Pose, bool]:
        """The pose after one transition, and whether it was blocked."""
        w, a, s, d, _, j, _, l = (int(k) for k in keys)
        angle = (pose.angle + (j - l) * self.yaw) % 360.0
        ahead, right = w - s, d - a
        if not (ahead or right):
            return pose._replace(angle=angle), False
        c, n = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        x = pose.x + self.step * (ahead * c + right * n)
        y = pose.y + self.step * (ahead * n - right * c)
        z = self.world.move(pose, x, y)
        if z is None:
            return pose._replace(angle=angle), True
        return Pose(x, y, z, angle), False

    def follow(self, pose: Pose, keys: Keys) -> tuple[list[Pose], int]:
        """The poses after every transition, and the first blocked transition (len(keys) if none is)."""
        poses, first = [], len(keys)
        for i, k in enumerate(keys):
            pose, blocked = self.advance(pose, k)
            poses.append(pose)
            if blocked:
                first = min(first, i)
        return poses, first

    def clear(self, pose: Pose, keys: Keys) -> int:
        """How many transitions from `pose` are free; stops asking at the first blocked one."""
        for i, k in enumerate(keys):
            pose, blocked = self.advance(pose, k)
            if blocked:
                return i
        return len(keys)

    def start(self, rng: np.random.Generator, tries: int = 12) -> Pose:
        """A free place to begin, if possible with some room ahead; any heading."""
        found = None
        for _ in range(tries * 8):
            x, y = self.world.spawn(rng)
            z = self.world.enter(x, y)
            angle = float(rng.integers(360))
            if z is None:
                continue
            found = Pose(x, y, z, angle)
            tries -= 1
            ahead = max(1, round(60 / self.step))
            if tries <= 0 or self.clear(found, hold("W", ahead)) == ahead:
                break
        if found is None:
            raise RuntimeError("no free place to stand was found in this map")
        return found


def reverse(keys: Keys) -> Keys:
    """Transitions that undo `keys` exactly: n give n + 1, because a transition turns before it moves."""
    opposite = keys[:, [2, 3, 0, 1, 6, 7, 4, 5]]  # W<->S A<->D I<->K J<->L
    undone = np.zeros((len(keys) + 1, 8), np.uint8)
    undone[:-1, :4] = opposite[::-1, :4]
    undone[1:, 4:] = opposite[::-1, 4:]
    return undone
