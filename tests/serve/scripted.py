"""A session that is drawn by ray casting instead of a network: obeys every key and event, for tests of server and page.

A courtyard of blocks under a sky, in NumPy; words of the prompt make it night, foggy or snowy. What it shows is not
the subject: that keys, prompts, snapshots and seeds arrive is.
"""

import dataclasses
import time

import numpy as np

from lingbot_jax.control import keyboard
from lingbot_jax.rollout.session import SessionConfig
from lingbot_jax.serve import game as games
from lingbot_jax.serve.game import Game
from tests.serve.worlds import PLAYED

GRID = np.array(
    [
        list(row)
        for row in (
            "############",
            "#....#.....#",
            "#.o..#..o..#",
            "#..........#",
            "##.##...o..#",
            "#.......#..#",
            "#..o....#..#",
            "#.....o....#",
            "#.##.....o.#",
            "#....o.....#",
            "#..........#",
            "############",
        )
    ]
)
SCALE = 1.2  # cells per world unit
COLOURS = {"#": (176, 122, 96), "o": (112, 148, 120)}


@dataclasses.dataclass(frozen=True)
class Place:
    """What a session is, as `HostState` in little."""

    seed: int
    chunk: int
    c2w: np.ndarray
    prompt: str


class ScriptedSession:
    """Stands in for `rollout.session.Session`."""

    seconds = 0.0  # that a chunk takes

    def __init__(self, world: object, **settings):
        self.config = SessionConfig(**settings)
        self.host: Place | None = None
        self._size = (72, 96)

    def start(self, image, prompt: str, seed: int = 0, intrinsics=None) -> None:
        self._size = image.shape[:2]
        self._tint = image.reshape(-1, 3).mean(0)
        self.host = Place(seed, 0, np.eye(4), prompt)

    @property
    def transitions(self) -> int:
        return 4 * (self.config.causal.chunk - (self.host.chunk == 0))

    def step(self, keys: np.ndarray) -> np.ndarray:
        time.sleep(self.seconds)
        rows = np.concatenate([np.zeros((1, 8), bool), keys])
        do = self.config.keyboard
        path = keyboard.integrate(rows, self.host.c2w, do.step_size, do.turn_rate, do.turn_rate)
        shown = path if self.host.chunk == 0 else path[1:]
        self.host = dataclasses.replace(self.host, chunk=self.host.chunk + 1, c2w=path[-1])
        return np.stack([self._draw(c2w, i) for i, c2w in enumerate(shown)])

    def set_prompt(self, prompt: str) -> None:
        self.host = dataclasses.replace(self.host, prompt=prompt)

    def snapshot(self) -> tuple[Place, np.ndarray]:
        return self.host, self._tint

    def restore(self, snapshot: tuple[Place, np.ndarray]) -> None:
        self.host, self._tint = snapshot

    def close(self) -> None:
        self.host = None

    def _draw(self, c2w: np.ndarray, i: int) -> np.ndarray:
        height, width = self._size
        yaw = np.arctan2(c2w[0, 2], c2w[2, 2])
        horizon = height / 2 + np.tan(keyboard.elevation(c2w[None, :3, :3])[0]) * width / 2
        x, z = 7.5 + SCALE * c2w[0, 3], 10.4 - SCALE * c2w[2, 3]
        column = (np.arange(width) + 0.5) / width * 2 - 1
        angle = yaw + np.arctan(column)
        dx, dz = np.sin(angle), -np.cos(angle)
        far, kind, along = _cast(x, z, dx, dz)
        depth = far * np.cos(angle - yaw)
        rows = np.arange(height)[:, None]
        tall = 0.55 * width / np.maximum(depth, 0.05)
        top, bottom = horizon - 0.55 * tall, horizon + 0.25 * tall
        # Sky, ground in squares, walls in courses of brick.
        up = np.clip((horizon - rows) / height, 0, 1)
        sky = np.array([150, 190, 235]) + up[..., None] * np.array([-90, -70, -20])
        away = 0.25 * 0.55 * width / np.maximum(rows - horizon, 0.5)
        flat = away / np.cos(angle - yaw)
        squares = (np.floor((x + flat * dx) * 2) + np.floor((z + flat * dz) * 2)) % 2
        ground = np.array([126, 134, 92]) + squares[..., None] * np.array([-22, -18, -16])
        image = np.where((rows < horizon)[..., None], np.broadcast_to(sky, (height, width, 3)), ground)
        wall = (rows >= top) & (rows < bottom)
        course = np.floor((rows - top) / tall * 8)
        brick = ((along * 4 + 0.5 * (course % 2)) % 1 < 0.08) | ((rows - top) / tall * 8 % 1 < 0.14)
        paint = np.stack([COLOURS[k] for k in kind]) * (0.65 + 0.35 * (along * 4 % 1 > 0))[:, None]
        image = np.where(wall[..., None], paint[None] * np.where(brick, 0.72, 1.0)[..., None], image)
        distance = np.where(wall, depth, np.where(rows < horizon, 9.0, away))[..., None]
        haze = 1 - np.exp(-distance / (1.6 if "fog" in self.host.prompt else 11.0))
        image = image * (1 - haze) + np.array([196, 204, 214]) * haze
        image = image * 0.85 + 0.15 * self._tint
        if "snow" in self.host.prompt:
            flakes = (
                np.random.default_rng([self.host.seed, self.host.chunk, i]).random((height, width)) < 0.03
            )
            image = np.where(flakes[..., None], 250, image * 0.8 + 45)
        if "night" in self.host.prompt:
            image = image * np.array([0.2, 0.24, 0.42])
        return np.clip(image, 0, 255).astype(np.uint8)


def _cast(x: float, z: float, dx: np.ndarray, dz: np.ndarray) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Distance of the first block on each ray, its kind, and where on its face it is hit; the yard repeats."""
    steps = np.arange(0.02, 14.0, 0.02)
    px, pz = x + steps[:, None] * dx, z + steps[:, None] * dz
    cells = GRID[np.floor(pz).astype(int) % 12, np.floor(px).astype(int) % 12]
    solid = cells != "."
    first = np.where(solid.any(0), solid.argmax(0), len(steps) - 1)
    at = np.arange(len(dx))
    hit_x, hit_z = px[first, at], pz[first, at]
    edge = np.minimum(hit_x % 1, 1 - hit_x % 1) < np.minimum(hit_z % 1, 1 - hit_z % 1)
    kinds = [kind if kind in COLOURS else "#" for kind in cells[first, at]]
    return steps[first], kinds, np.where(edge, hit_z % 1, hit_x % 1)


@dataclasses.dataclass(frozen=True)
class ScriptedGame(Game):
    """A game whose world is the ray caster."""

    def open(self) -> None:
        return None


def install(seconds: float = 0.0) -> None:
    """From now on sessions of this process are scripted."""
    ScriptedSession.seconds = seconds
    games.Session = ScriptedSession


def first_picture(size: tuple[int, int] = (72, 96), seed: int = 0, prompt: str = "") -> np.ndarray:
    """What the courtyard looks like from where a world begins."""
    session = ScriptedSession(None, causal=PLAYED.causal, keyboard=PLAYED.keyboard)
    tint = np.random.default_rng(seed).integers(60, 220, 3).astype(np.uint8)
    session.start(np.broadcast_to(tint, (*size, 3)), prompt, seed)
    return session.step(np.zeros((0, 8), bool))[0]


def game(config) -> ScriptedGame:
    """A game without a bundle: three pictures of the courtyard."""
    words = ("a courtyard of blocks", "a foggy courtyard", "a courtyard at night")
    shown = [
        games._beginning(first_picture(seed=i, prompt=p), p, None, (72, 96)) for i, p in enumerate(words)
    ]
    session = SessionConfig.of(PLAYED)
    return ScriptedGame(config, "The courtyard", (72, 96), config.fps or 16.0, session, 4, tuple(shown))
