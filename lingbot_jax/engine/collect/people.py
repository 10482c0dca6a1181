"""People who walk about in a place: box figures on straight paths, to and fro, that nobody runs into."""

import dataclasses

import numpy as np
from jaxtyping import Float

from lingbot_jax.engine.collect.places import HUES, RADIUS, Builder, Mesh, Place

PACE = 2.5  # map units per frame
_APART = 52.0  # map units between a person and the camera at least
_STRIDE = 7.0  # map units that a leg swings either way
_SKIN, _TROUSERS = (0.86, 0.66, 0.52), (0.20, 0.21, 0.28)


@dataclasses.dataclass(frozen=True)
class Person:
    """A figure and where it is in every frame.

    Attributes:
      mesh: about the origin. ahead: unit direction. legs: 1 and -1 at the corners of the two legs,
      else 0. track: place in every frame.
    """

    mesh: Mesh
    ahead: Float[np.ndarray, "2"]
    legs: Float[np.ndarray, "v"]
    track: Float[np.ndarray, "f 2"]

    def at(self, frame: int) -> Float[np.ndarray, "v 3"]:
        """The corners in a frame; feet swing, hips do not."""
        corners = self.mesh.corners.copy()
        swing = self.legs * _STRIDE * np.sin(frame * PACE / 9.0) * np.clip(1 - corners[:, 2] / 34.0, 0, 1)
        corners[:, :2] += self.track[frame] + swing[:, None] * self.ahead
        return corners


def meet(
    rng: np.random.Generator, place: Place, camera: Float[np.ndarray, "f 2"], tries: int = 40
) -> tuple[Person, ...]:
    """One or two people in front of a camera that moves as given; none where there is no room for any."""
    found: list[Person] = []
    wanted = int(rng.integers(1, 3))
    hues = [str(h) for h in rng.permutation([h for h in HUES if h not in ("brown", "white")])]
    for _ in range(tries):
        if len(found) == wanted:
            break
        track, ahead = _track(rng, place, len(camera))
        others = [camera, *(p.track for p in found)]
        apart = min(float(np.linalg.norm(track - other, axis=1).min()) for other in others)
        if place.free(track).all() and apart > _APART:
            found.append(_figure(hues[len(found)], place.sun, ahead, track))
    return tuple(found)


def _track(
    rng: np.random.Generator, place: Place, frames: int
) -> tuple[Float[np.ndarray, "f 2"], Float[np.ndarray, "2"]]:
    """To and fro between two points, from somewhere on the way; and the direction."""
    begin, turn = np.array(place.spawn(rng)), rng.uniform(0, 2 * np.pi)
    ahead = np.array([np.cos(turn), np.sin(turn)])
    length = float(rng.uniform(60, 220))
    way = np.abs((rng.uniform(0, 2 * length) + PACE * np.arange(frames)) % (2 * length) - length)
    return begin + way[:, None] * ahead, ahead


def _figure(hue: str, sun: np.ndarray, ahead: np.ndarray, track: np.ndarray) -> Person:
    cos, sin = ahead
    turned = np.array(
        [cos * sun[0] + sin * sun[1], -sin * sun[0] + cos * sun[1], sun[2]]
    )  # as the figure sees it
    build = Builder(turned)
    for side in (-1, 1):
        build.box(0.0, side * 8.0, 6.0, 34.0, _TROUSERS)
    in_legs = len(build.mesh().corners)
    build.box(0.0, 0.0, 9.0, 66.0, HUES[hue], low=34.0, depth=0.9 * RADIUS)
    build.box(0.0, 0.0, 8.0, 84.0, _SKIN, low=66.0)
    mesh = build.mesh()
    x, y, z = mesh.corners.T
    legs = np.zeros(len(x))
    legs[:in_legs] = np.sign(mesh.corners[:in_legs, 1])
    corners = np.stack([cos * x - sin * y, sin * x + cos * y, z], axis=1)
    return Person(dataclasses.replace(mesh, corners=corners), ahead, legs, track)
