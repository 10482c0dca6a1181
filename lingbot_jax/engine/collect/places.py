"""Places to walk in, generated from a seed: walled, low-poly, made to be read at 64 x 48 pixels.

Few, large, near things; every wall has a hue of its own, so that a view says where one is; walls close the view.
Units are map units as in `walk.py`: x east, y north, z up, the player 32 wide with eyes at `EYE`.

A place is a soup of quads (`Mesh`) whose corners carry what light needs to know (`weather.py` turns that into colours),
and rectangles that nobody walks into.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from lingbot_jax.engine.collect.walk import Pose, Spot

EYE = 44.0  # height of the camera above the ground
RADIUS = 18.0  # of the player, and of the people who walk about
SEAM = 3.0  # that walls and ground reach into each other: where pieces only touch, the sky shines through
CELL = 72.0  # largest side of a piece of ground or wall: light and haze are computed at corners

HUES = {
    "red": (0.80, 0.22, 0.19),
    "orange": (0.93, 0.52, 0.16),
    "yellow": (0.95, 0.80, 0.28),
    "green": (0.30, 0.60, 0.27),
    "teal": (0.16, 0.60, 0.60),
    "blue": (0.22, 0.40, 0.82),
    "purple": (0.54, 0.31, 0.70),
    "pink": (0.93, 0.56, 0.68),
    "white": (0.93, 0.91, 0.86),
    "brown": (0.52, 0.35, 0.23),
}
GROUNDS = {  # two tones each
    "grass": ((0.46, 0.66, 0.28), (0.34, 0.54, 0.22)),
    "sand": ((0.90, 0.78, 0.54), (0.78, 0.64, 0.42)),
    "grey stone": ((0.66, 0.66, 0.68), (0.48, 0.49, 0.53)),
    "red tiles": ((0.76, 0.46, 0.36), (0.60, 0.33, 0.26)),
    "planks": ((0.64, 0.47, 0.32), (0.50, 0.35, 0.23)),
}
GLASS, LAMPLIGHT = (0.22, 0.28, 0.38), (1.0, 0.80, 0.42)
HEDGE, TRUNK, LEAVES = (0.20, 0.45, 0.18), (0.42, 0.28, 0.18), (0.22, 0.52, 0.22)
PLASTER, SHADE = (0.82, 0.76, 0.66), 0.72  # SHADE: light left in corners near the ground


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Quads, four corners each, v = 4 q of them.

    Attributes:
      corners: `v 3`, map units. albedo: colour near by; far: colour far off, where a pattern would only flicker.
      sun: `v`, cosine to the sun, 0 in its shadow. ambient: `v`, share of the sky's light that arrives.
      up: `v`, 1 where snow lies. glow: `v 3`, light given off in the dark. lamp: `v`, light received from lamps.
    """

    corners: Float[np.ndarray, "v 3"]
    albedo: Float[np.ndarray, "v 3"]
    far: Float[np.ndarray, "v 3"]
    sun: Float[np.ndarray, "v"]
    ambient: Float[np.ndarray, "v"]
    up: Float[np.ndarray, "v"]
    glow: Float[np.ndarray, "v 3"]
    lamp: Float[np.ndarray, "v"]

    def __add__(self, other: "Mesh") -> "Mesh":
        join = lambda f: np.concatenate([getattr(self, f.name), getattr(other, f.name)])
        return Mesh(**{f.name: join(f) for f in dataclasses.fields(Mesh)})


class Builder:
    """Collects quads under one sun, whose direction (towards it) is `sun`."""

    def __init__(self, sun: np.ndarray):
        self.sun = sun
        self.lamps: list[tuple[float, float, float]] = []
        self._quads: list[tuple] = []

    def quad(self, a, b, c, d, albedo, far=None, lit=None, ambient=None, glow=(0.0, 0.0, 0.0)) -> None:
        """One quad, its corners in order, seen from where they run anticlockwise; `lit` in place of the cosine."""
        corners = np.array([a, b, c, d], float)
        normal = np.cross(corners[1] - corners[0], corners[2] - corners[0])
        if not normal.any():  # a triangle: two corners are one
            normal = np.cross(corners[2] - corners[0], corners[3] - corners[0])
        normal /= np.linalg.norm(normal)
        cosine = max(0.0, float(normal @ self.sun)) if lit is None else lit
        floor = SHADE + (1 - SHADE) * np.clip(corners[:, 2] / 50.0, 0, 1)
        light = np.where(abs(normal[2]) > 0.9, 1.0, floor) if ambient is None else np.full(4, ambient)
        self._quads.append(
            (corners, albedo, albedo if far is None else far, cosine, light, float(normal[2] > 0.4), glow)
        )

    def sheet(self, a, b, c, d, albedo, **more) -> None:
        """A parallelogram (d = a + c - b) in pieces of `CELL` at most."""
        a, b, d = (np.array(p, float) for p in (a, b, d))
        along, up = b - a, d - a
        n, m = (max(1, int(np.ceil(np.linalg.norm(v) / CELL))) for v in (along, up))
        at = lambda i, j: a + along * (i / n) + up * (j / m)
        for i in range(n):
            for j in range(m):
                self.quad(at(i, j), at(i + 1, j), at(i + 1, j + 1), at(i, j + 1), albedo, **more)

    def box(self, x, y, half, height, albedo, top=None, low=0.0, depth=None) -> None:
        """An upright box on a base of 2 `half` x 2 `depth` about (x, y), from `low` to `height`."""
        deep = half if depth is None else depth
        ring = [(x - half, y - deep), (x + half, y - deep), (x + half, y + deep), (x - half, y + deep)]
        for p, q in zip(ring, ring[1:] + ring[:1], strict=True):
            self.sheet((*p, low), (*q, low), (*q, height), (*p, height), albedo)
        self.quad(*((*p, height) for p in ring), albedo if top is None else top)

    def roof(self, x, y, half, low, height, albedo, sides=4) -> None:
        """A pyramid of that many sides."""
        turn = np.arange(sides) * 2 * np.pi / sides + np.pi / sides
        reach = half / np.cos(np.pi / sides)
        ring = [(x + reach * np.cos(t), y + reach * np.sin(t), low) for t in turn]
        for p, q in zip(ring, ring[1:] + ring[:1], strict=True):
            self.quad(p, q, (x, y, height), (x, y, height), albedo)

    def shadow(self, x, y, half, height, albedo) -> None:
        """What lies in the shadow of a box, as far as two of its heights: ground without sun."""
        reach = min(2.0, 1.0 / max(self.sun[2], 1e-3)) * height * -self.sun[:2] * 0.7
        near = np.array([[-half, -half], [half, -half], [half, half], [-half, half]]) + [x, y]
        for i in range(4):
            p, q = near[i], near[(i + 1) % 4]
            ring = [p, q, q + reach, p + reach]
            edge, side = q - p, reach
            if edge[0] * side[1] - edge[1] * side[0] < 0:
                ring.reverse()
            self.quad(*((*r, 0.6) for r in ring), albedo, lit=0.0, ambient=0.9)
        self.quad(*((*r, 0.6) for r in near + reach), albedo, lit=0.0, ambient=0.9)

    def mesh(self) -> Mesh:
        names = ("corners", "albedo", "far", "sun", "ambient", "up", "glow")
        parts = dict(zip(names, zip(*self._quads, strict=True), strict=True))
        corners = np.concatenate(parts["corners"])
        each = {
            n: np.repeat(np.array(parts[n], float), 4, axis=0)
            for n in names
            if n not in ("corners", "ambient")
        }
        lamp = np.zeros(len(corners))
        for spot in self.lamps:
            lamp += np.exp(-((np.linalg.norm(corners - spot, axis=1) / 90.0) ** 2))
        return Mesh(corners=corners, ambient=np.concatenate(parts["ambient"]), lamp=lamp, **each)


@dataclasses.dataclass(frozen=True)
class Place:
    """A place as behaviours see it (`walk.World`), as a mesh, and in words.

    Attributes:
      sun: direction towards the sun. half: of its extent along x and y. blocks: `n 4`, x0 y0 x1 y1 not to walk into.
    """

    mesh: Mesh
    sun: Float[np.ndarray, "3"]
    half: tuple[float, float]
    blocks: Float[np.ndarray, "n 4"]
    doors: tuple[Spot, ...]
    landmarks: tuple[Spot, ...]
    description: str

    def free(self, points: Float[np.ndarray, "*n 2"]) -> Bool[np.ndarray, "*n"]:
        """Whether a body of `RADIUS` fits at each x, y."""
        room = (np.abs(points) <= np.array(self.half) - RADIUS).all(-1)
        low, high = self.blocks[:, :2] - RADIUS, self.blocks[:, 2:] + RADIUS
        inside = (points[..., None, :] > low) & (points[..., None, :] < high)
        return room & ~inside.all(-1).any(-1)

    def enter(self, x: float, y: float) -> float | None:
        return 0.0 if self.free(np.array([x, y])) else None

    def move(self, start: Pose, x: float, y: float) -> float | None:
        return self.enter(x, y)

    def spawn(self, rng: np.random.Generator) -> tuple[float, float]:
        x, y = rng.uniform(-1, 1, 2) * self.half
        return float(x), float(y)


def _facade(build: Builder, a, b, height: float, hue, rng: np.random.Generator, plain: bool) -> None:
    """A wall from a to b (inside on its left) as one house front: wall, and large windows and a door unless plain."""
    a, b = np.array(a, float), np.array(b, float)
    length = float(np.linalg.norm(b - a))
    along = (b - a) / length
    inward = np.array([-along[1], along[0]])
    left, right = a - SEAM * along, b + SEAM * along
    build.sheet((*left, -SEAM), (*right, -SEAM), (*right, height), (*left, height), hue)
    if plain or length < 110:
        return

    def panel(middle: float, wide: float, low: float, high: float, colour, glow) -> None:
        p, q = (a + along * (middle + s * wide / 2) + inward * 2.0 for s in (-1, 1))
        build.quad((*p, low), (*q, low), (*q, high), (*p, high), colour, glow=glow)

    bays = max(2, int(length // 100))
    door = int(rng.integers(bays))
    for bay in range(bays):
        middle = length * (bay + 0.5) / bays
        if bay == door:
            panel(middle, 42, 0, 72, np.array(hue) * 0.35, (0, 0, 0))
        else:
            panel(middle, 44, 38, 80, GLASS, LAMPLIGHT)


def _thing(build: Builder, kind: str, x: float, y: float, size: float, hue, ground) -> None:
    """A thing of half width `size` on the ground."""
    shade = lambda half, height: build.shadow(x, y, half, height, ground)
    if kind == "box":
        build.box(x, y, size, 1.6 * size, hue)
        shade(size, 1.6 * size)
    elif kind == "hut":
        build.box(x, y, size, 1.7 * size, PLASTER)
        build.roof(x, y, 1.25 * size, 1.7 * size, 3.0 * size, hue)
        shade(size, 2.2 * size)
    elif kind == "pillar":
        build.box(x, y, 0.55 * size, 110.0, hue)
        build.box(x, y, 0.8 * size, 122.0, hue, low=110.0)
        shade(0.55 * size, 110.0)
    elif kind == "tree":
        build.box(x, y, 0.22 * size, 45.0, TRUNK)
        build.roof(x, y, size, 34.0, 34.0 + 3.0 * size, LEAVES, sides=6)
        shade(0.6 * size, 60.0)
    else:  # a lamp
        build.box(x, y, 5.0, 84.0, (0.25, 0.25, 0.28))
        half = 12.0
        ring = [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
        for p, q in zip(ring, ring[1:] + ring[:1], strict=True):
            build.quad((*p, 80), (*q, 80), (*q, 106), (*p, 106), (0.95, 0.90, 0.75), glow=LAMPLIGHT)
        build.roof(x, y, 17.0, 106.0, 120.0, (0.25, 0.25, 0.28))
        build.lamps.append((x, y, 70.0))


_KINDS = ("courtyard", "street", "garden", "two courtyards")
_THINGS = {
    "courtyard": ("box", "hut", "pillar", "lamp"),
    "street": ("box", "lamp", "tree"),
    "garden": ("tree", "tree", "hut", "lamp"),
    "two courtyards": ("box", "hut", "pillar", "lamp"),
}


def generate(seed: int) -> Place:
    """The place of a seed."""
    rng = np.random.default_rng([seed, 0x706C6163])
    kind = _KINDS[rng.integers(len(_KINDS))]
    around, high = rng.uniform(0, 2 * np.pi), rng.uniform(0.55, 0.95)
    sun = np.array([np.cos(around) * np.cos(high), np.sin(around) * np.cos(high), np.sin(high)])
    build = Builder(sun)
    half = tuple(rng.uniform(*{"street": (85, 115), "two courtyards": (150, 200)}.get(kind, (170, 240)), 2))
    if kind in ("street", "two courtyards"):
        half = (half[0], float(rng.uniform(270, 340)))
    half = (float(half[0]), float(half[1]))
    names = [str(n) for n in rng.permutation(list(HUES))]
    ground = "grass" if kind == "garden" else str(rng.choice([g for g in GROUNDS if g != "grass"]))
    _ground(build, half, GROUNDS[ground])
    if kind == "garden":
        names = ["green", *[n for n in names if n != "green"]]
    _walls(build, kind, half, names, rng)

    mean = np.mean(GROUNDS[ground], axis=0)
    blocks, doors = [], ()
    if kind == "two courtyards":
        doors = (Spot(0.0, 0.0, 90.0),)
        blocks += _gate(build, half[0], HUES[names[4]])
    hues = [HUES[n] for n in names[4:] if n != "white"]
    spots = []
    for _ in range(60):
        if len(spots) == (3 if kind == "street" else 5):
            break
        size = float(rng.uniform(24, 42)) * (0.75 if kind == "street" else 1.0)
        x, y = (float(v) for v in rng.uniform(-1, 1, 2) * (np.array(half) - size - 25))
        if not spots and kind in ("courtyard", "garden"):
            x, y = 0.3 * x, 0.3 * y  # something to walk around
        reach = size + 2 * RADIUS + 12
        apart = all(abs(x - p[0]) > reach + p[2] or abs(y - p[1]) > reach + p[2] for p in spots)
        if not apart or (kind == "two courtyards" and abs(y) < reach + 20):
            continue
        thing = str(rng.choice(_THINGS[kind]))
        _thing(build, thing, x, y, size, hues[len(spots) % len(hues)], mean)
        solid = {"lamp": 14.0, "pillar": 0.8 * size, "hut": 1.05 * size, "tree": 0.8 * size}.get(thing, size)
        blocks.append((x - solid, y - solid, x + solid, y + solid))
        spots.append((x, y, size))
    return Place(
        mesh=build.mesh(),
        sun=sun,
        half=half,
        blocks=np.array(blocks, float).reshape(-1, 4),
        doors=doors,
        landmarks=tuple(Spot(x, y) for x, y, _ in spots),
        description=_describe(kind, names, ground),
    )


def _describe(kind: str, names: list[str], ground: str) -> str:
    if kind == "garden":
        return f"a garden with green hedges, trees and {ground}"
    what = "houses" if kind == "street" else "walls"
    kind = kind if kind == "two courtyards" else f"a {kind}"
    return f"{kind} of {ground} with {', '.join(names[:3])} and {names[3]} {what}"


def _ground(build: Builder, half: tuple[float, float], tones) -> None:
    """A chequered ground of large cells; far off it is of one tone."""
    mean, light = np.mean(tones, axis=0), 1.0
    counts = [max(2, round(2 * h / CELL)) for h in half]
    edges = [np.linspace(-h - SEAM, h + SEAM, n + 1) for h, n in zip(half, counts, strict=True)]
    for i, (x, x2) in enumerate(zip(edges[0], edges[0][1:], strict=False)):
        for j, (y, y2) in enumerate(zip(edges[1], edges[1][1:], strict=False)):
            tone = tones[(i + j) % 2]
            build.quad((x, y, 0), (x2, y, 0), (x2, y2, 0), (x, y2, 0), tone, far=mean, ambient=light)


def _walls(build: Builder, kind: str, half, names: list[str], rng: np.random.Generator) -> None:
    """The four walls that close the view, each of its own hue; the long ones of a street are rows of houses."""
    x, y = half
    ring = [(-x, -y), (x, -y), (x, y), (-x, y)]
    for side, (a, b) in enumerate(zip(ring, ring[1:] + ring[:1], strict=True)):
        low, high = {"street": (120, 190), "garden": (60, 95)}.get(kind, (85, 140))
        if kind == "garden":
            hue = HEDGE if side else HUES[names[1]]  # three hedges and a house to tell them apart
            _facade(
                build, a, b, float(rng.uniform(low, high)) * (1.0 if side else 1.5), hue, rng, plain=side > 0
            )
            continue
        parts = 3 if kind == "street" and side % 2 else 1
        edges = np.linspace(0, 1, parts + 1)
        for k in range(parts):
            p, q = (np.array(a) * (1 - t) + np.array(b) * t for t in edges[k : k + 2])
            name = names[(side + k * 2) % 4] if parts > 1 else names[side]
            plain = bool(kind != "street" and rng.random() < 0.4)
            _facade(build, p, q, float(rng.uniform(low, high)), HUES[name], rng, plain)


def _gate(build: Builder, half: float, hue) -> list[tuple[float, float, float, float]]:
    """A wall across the place with a gateway in its middle; the rectangles that it blocks."""
    gap, thick, height = 56.0, 10.0, 100.0
    blocks = []
    for side in (-1, 1):
        middle, deep = side * (half + gap) / 2, (half - gap) / 2
        build.box(middle, 0.0, deep, height, hue, depth=thick)
        blocks.append((middle - deep, -thick, middle + deep, thick))
    build.box(0.0, 0.0, gap, height, hue, low=78.0, depth=thick)
    return blocks
