"""Maps to play in: a generator of rooms in pure Python, and static copies of the bundled Freedoom maps.

A map is a list of WAD lumps. The generator writes UDMF text (the engine builds the BSP itself): a grid of
square rooms, each with its own wall, floor and ceiling, doorways with bright frames between most neighbours,
and a coloured pillar in some rooms. Textures are large and plain on purpose: at 64 x 48 pixels fine ones are
noise. A static copy keeps the geometry of a bundled map and removes what moves: things, sector specials
(flicker, damage) and line specials (exits, lifts).
"""

import dataclasses
import struct
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import Float

from lingbot_jax.config import require
from lingbot_jax.engine.collect.walk import Spot

Lumps = list[tuple[str, bytes]]

CELL = 288  # map units from room to room
WALL = 32  # thickness of the walls between rooms
DOOR = 112  # width and height of a doorway
PILLAR = 48  # side of a pillar

# Texture -> words for captions. All are in both bundled game files.
WALLS = {
    "ZZWOLF11": "red brick",
    "ZZWOLF9": "blue stone",
    "STWALL": "orange block",
    "STARG1": "pale green panel",
    "SHAWN2": "silver metal",
    "A-TILE": "green tile",
    "STARBR1": "terracotta",
    "GRAY7": "grey concrete",
    "WOOD10": "dark wood",
}
FLOORS = {
    "FLAT14": "blue carpet",
    "FLOOR1_6": "red carpet",
    "AQF022": "grass",
    "FLAT8": "brown tiles",
    "FLAT19": "grey stone",
    "FLAT23": "polished metal",
    "FLOOR0_1": "wooden boards",
}
CEILINGS = ("FLAT19", "FLAT1", "FLOOR0_1", "FLAT20", "CEIL3_5")
FRAMES = {"PORAN": "orange", "PWHITE": "white", "PBLUE": "blue", "PGREEN": "green", "PRED": "red"}
PILLARS = FRAMES


@dataclasses.dataclass(frozen=True)
class Map:
    """Lumps to play and what is known of the place.

    Attributes:
      name: in the records. iwad: file name of the game it belongs to. lumps: of a WAD file.
      lump: the map's name inside the WAD, 8 letters at most. description: of the whole.
      rooms: centre and description of every room, in map units; empty if unknown.
      doors, landmarks: see walk.World.
      points: where a player may begin (rooms are sampled within `spread` of each point).
    """

    name: str
    iwad: str
    lumps: Lumps
    lump: str
    description: str
    rooms: tuple[tuple[Spot, str], ...]
    doors: tuple[Spot, ...]
    landmarks: tuple[Spot, ...]
    points: tuple[Spot, ...]
    spread: float

    def describe(self, points: Float[np.ndarray, "f 2"]) -> list[str]:
        """The places at x, y, in words: the nearest room, or the map as a whole."""
        if not self.rooms:
            return [self.description] * len(points)
        centres = np.array([[spot.x, spot.y] for spot, _ in self.rooms])
        nearest = np.abs(points[:, None] - centres).max(axis=-1).argmin(axis=1)
        return [self.rooms[k][1] for k in nearest]


class _Udmf:
    """Collects vertices, sides, lines and sectors of a UDMF text map."""

    def __init__(self):
        self._vertices: dict[tuple[int, int], int] = {}
        self._sides: list[str] = []
        self._lines: list[str] = []
        self._sectors: list[str] = []
        self._things: list[str] = []

    def sector(self, floor: str, ceiling: str, height: int, light: int) -> int:
        self._sectors.append(
            f'sector{{heightfloor=0;heightceiling={height};texturefloor="{floor}";'
            f'textureceiling="{ceiling}";lightlevel={light};}}'
        )
        return len(self._sectors) - 1

    def _vertex(self, point: tuple[int, int]) -> int:
        return self._vertices.setdefault(point, len(self._vertices))

    def _side(self, sector: int, wall: str, middle: bool) -> int:
        parts = ("texturemiddle", "texturetop") if middle else ("texturetop",)
        textures = "".join(f'{p}="{wall}";' for p in parts)
        self._sides.append(f"sidedef{{sector={sector};{textures}}}")
        return len(self._sides) - 1

    def wall(self, a: tuple[int, int], b: tuple[int, int], sector: int, texture: str) -> None:
        """A solid line; the sector is on its right going from a to b."""
        side = self._side(sector, texture, middle=True)
        self._lines.append(
            f"linedef{{v1={self._vertex(a)};v2={self._vertex(b)};sidefront={side};blocking=true;}}"
        )

    def opening(self, a: tuple[int, int], b: tuple[int, int], right: tuple[int, str], left: tuple[int, str]):
        """A passable line between two sectors; (sector, texture above the lower ceiling) of each side."""
        sides = self._side(*right, middle=False), self._side(*left, middle=False)
        self._lines.append(
            f"linedef{{v1={self._vertex(a)};v2={self._vertex(b)};sidefront={sides[0]};sideback={sides[1]};"
            "twosided=true;}"
        )

    def player(self, x: int, y: int) -> None:
        skills = "".join(f"skill{i}=true;" for i in range(1, 6))
        self._things.append(f"thing{{x={x}.0;y={y}.0;angle=0;type=1;{skills}single=true;}}")

    def text(self) -> bytes:
        vertices = [f"vertex{{x={x}.0;y={y}.0;}}" for x, y in self._vertices]
        parts = [*vertices, *self._lines, *self._sides, *self._sectors, *self._things]
        return ('namespace="zdoom";\n' + "\n".join(parts)).encode()


def _connections(rng: np.random.Generator, n: int) -> set[tuple[int, int, int]]:
    """Doors as (column, row, 0 east | 1 north): a random spanning tree and half of the other walls."""
    walls = [(i, j, 0) for i in range(n - 1) for j in range(n)] + [
        (i, j, 1) for i in range(n) for j in range(n - 1)
    ]
    group = {(i, j): i * n + j for i in range(n) for j in range(n)}
    doors = set()
    for k in rng.permutation(len(walls)):
        i, j, way = walls[k]
        a, b = group[i, j], group[i + (way == 0), j + (way == 1)]
        if a != b or rng.random() < 0.5:
            doors.add(walls[k])
            group = {room: a if g == b else g for room, g in group.items()}
    return doors


def generate(name: str, seed: int, n: int, lump: str) -> Map:
    """A map of n x n rooms. The same seed gives the same map.

    Args:
      name: of the map in the records. lump: its name in the WAD.
    """
    rng = np.random.default_rng([seed, 0x6D6170])
    udmf = _Udmf()
    pick = lambda table: list(table)[rng.integers(len(table))]
    doors = _connections(rng, n)
    inner = (CELL - WALL) // 2
    sectors, walls, rooms, landmarks = {}, {}, [], []
    for i in range(n):
        for j in range(n):
            wall, floor, ceiling = pick(WALLS), pick(FLOORS), pick(CEILINGS)
            height = int(rng.choice([128, 160, 192]))
            sector = udmf.sector(floor, ceiling, height, int(rng.choice([192, 208, 224])))
            sectors[i, j], walls[i, j] = sector, wall
            centre = Spot(float(i * CELL), float(j * CELL))
            words = f"a room with {WALLS[wall]} walls and a floor of {FLOORS[floor]}"
            if rng.random() < 0.4:
                texture = pick(PILLARS)
                _box(udmf, i * CELL, j * CELL, PILLAR // 2, sector, texture)
                landmarks.append(centre)
                words += f", around {'an' if texture == 'PORAN' else 'a'} {PILLARS[texture]} pillar"
            rooms.append((centre, words))
    spots = []
    for i in range(n):
        for j in range(n):
            for way, (dx, dy) in enumerate(((1, 0), (0, 1), (-1, 0), (0, -1))):
                here = (i, j, way) if way < 2 else (i + dx, j + dy, way - 2)
                if here in doors:
                    _side_with_door(udmf, i, j, dx, dy, inner, sectors[i, j], walls[i, j])
                else:
                    a, b = _corner(i, j, dx, dy, inner, -inner), _corner(i, j, dx, dy, inner, inner)
                    udmf.wall(b, a, sectors[i, j], walls[i, j])
    for i, j, way in sorted(doors):
        dx, dy = (1, 0) if way == 0 else (0, 1)
        other = i + dx, j + dy
        _doorway(
            udmf,
            i,
            j,
            dx,
            dy,
            inner,
            (sectors[i, j], walls[i, j]),
            (sectors[other], walls[other]),
            pick(FRAMES),
        )
        spots.append(Spot((i + dx / 2) * CELL, (j + dy / 2) * CELL, 90.0 * way))
    # The player's own start is never used; it stands off the pillars.
    udmf.player(PILLAR, PILLAR)
    lumps = [(lump, b""), ("TEXTMAP", udmf.text()), ("ENDMAP", b"")]
    centres = tuple(spot for spot, _ in rooms)
    return Map(
        name,
        "freedoom1.wad",
        lumps,
        lump,
        "a maze of plain rooms",
        tuple(rooms),
        tuple(spots),
        tuple(landmarks),
        centres,
        inner - 20.0,
    )


def _corner(i: int, j: int, dx: int, dy: int, out: int, along: int) -> tuple[int, int]:
    """The point `out` from room (i, j)'s centre towards (dx, dy) and `along` to the left of that way."""
    return i * CELL + dx * out - dy * along, j * CELL + dy * out + dx * along


def _box(udmf: _Udmf, x: int, y: int, half: int, sector: int, texture: str) -> None:
    """A solid square; the sector is around it."""
    ring = [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
    for a, b in zip(ring, ring[1:] + ring[:1], strict=True):
        udmf.wall(a, b, sector, texture)


def _side_with_door(
    udmf: _Udmf, i: int, j: int, dx: int, dy: int, inner: int, sector: int, wall: str
) -> None:
    """The two solid parts of a room's side beside a door; the opening itself belongs to the doorway."""
    p = [_corner(i, j, dx, dy, inner, along) for along in (inner, DOOR // 2, -DOOR // 2, -inner)]
    udmf.wall(p[0], p[1], sector, wall)
    udmf.wall(p[2], p[3], sector, wall)


def _doorway(udmf, i, j, dx, dy, inner, here, there, frame) -> None:
    """The short passage between two rooms: its own sector with coloured sides."""
    passage = udmf.sector("FLAT19", "FLAT19", DOOR, 224)
    near = [_corner(i, j, dx, dy, inner, along) for along in (DOOR // 2, -DOOR // 2)]
    far = [_corner(i, j, dx, dy, inner + WALL, along) for along in (DOOR // 2, -DOOR // 2)]
    udmf.opening(near[0], near[1], here, (passage, frame))
    udmf.opening(far[1], far[0], there, (passage, frame))
    udmf.wall(near[0], far[0], passage, frame)
    udmf.wall(far[1], near[1], passage, frame)


# --- bundled maps and WAD files ---------------------------------------------------------------------------------

_MAP_LUMPS = 10  # THINGS .. BLOCKMAP follow the map's name


def game_folder() -> Path:
    """Where vizdoom keeps its bundled games."""
    import vizdoom  # an extra; only collecting needs it

    return Path(vizdoom.__file__).parent


@cache
def _directory(iwad: str) -> tuple[bytes, tuple[tuple[str, int, int], ...]]:
    """A WAD file's bytes and its lumps as (name, offset, size)."""
    data = (game_folder() / iwad).read_bytes()
    count, offset = struct.unpack("<ii", data[4:12])
    entries = [struct.unpack("<ii8s", data[offset + 16 * i : offset + 16 * i + 16]) for i in range(count)]
    return data, tuple((name.rstrip(b"\0").decode("latin-1"), begin, size) for begin, size, name in entries)


def iwad_of(name: str) -> str:
    return "freedoom2.wad" if name.startswith("MAP") else "freedoom1.wad"


def bundled(name: str, min_light: int) -> Map:
    """A static copy of a bundled Freedoom map: `E1M5` or `MAP15`.

    Raises:
      ConfigError: there is no such map.
    """
    data, lumps = _directory(iwad_of(name))
    names = [n for n, _, _ in lumps]
    known = [n for n, m in zip(names, names[1:], strict=False) if m == "THINGS"]
    require(name in known, "bundled map", name, f"{iwad_of(name)} has {known[0]} .. {known[-1]}")
    index = names.index(name)
    parts = {n: data[begin : begin + size] for n, begin, size in lumps[index + 1 : index + 1 + _MAP_LUMPS]}
    things = np.frombuffer(parts["THINGS"], "<i2").reshape(-1, 5)  # x y angle type flags
    lines = (
        np.frombuffer(parts["LINEDEFS"], "<i2").reshape(-1, 7).copy()
    )  # v1 v2 flags special tag front back
    lines[:, 3] = 0
    sectors = np.frombuffer(parts["SECTORS"], np.uint8).reshape(-1, 26).copy()
    fields = sectors[:, 20:26].copy().view("<i2")  # light special tag
    fields[:, 0] = np.maximum(fields[:, 0], min_light)
    fields[:, 1] = 0
    sectors[:, 20:26] = fields.view(np.uint8)
    parts["THINGS"] = things[things[:, 3] == 1].tobytes()
    parts["LINEDEFS"], parts["SECTORS"] = lines.tobytes(), sectors.tobytes()
    points = tuple(Spot(float(x), float(y)) for x, y in things[:, :2])
    words = f"the level {name} of Freedoom, a place of halls and yards"
    return Map(name, iwad_of(name), [(name, b""), *parts.items()], name, words, (), (), (), points, 48.0)


def write_wad(path: Path, lumps: Lumps) -> None:
    """Writes a PWAD file."""
    data, directory = b"".join(blob for _, blob in lumps), b""
    offset = 12
    for name, blob in lumps:
        directory += struct.pack("<ii8s", offset, len(blob), name.encode())
        offset += len(blob)
    path.write_bytes(struct.pack("<4sii", b"PWAD", len(lumps), offset) + data + directory)
