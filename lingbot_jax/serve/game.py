"""A world that is ready to be played: what a bundle says before its arrays are read, and sessions of it after."""

import dataclasses
import io
from collections.abc import Callable, Iterable
from typing import Any

import cv2
import jax
import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image

from lingbot_jax.config import require
from lingbot_jax.control import keyboard
from lingbot_jax.rollout.images import cover, decode_image, read_image
from lingbot_jax.rollout.session import Session, SessionConfig, Snapshot
from lingbot_jax.serve.config import ServeConfig
from lingbot_jax.serve.messages import Frame, Refused
from lingbot_jax.worlds import manifest
from lingbot_jax.worlds.config import pixels_per_token
from lingbot_jax.worlds.manifest import Intrinsics
from lingbot_jax.worlds.open import default_mesh, find, open_world
from lingbot_jax.worlds.world import World

DEFAULT_FPS = 16.0
MAX_PIXELS = 4096 * 4096  # of a frame
SMALL = (
    320 * 240
)  # pixels of a frame that is shown much larger than it is, so that every trace of JPEG would be seen
Held = Callable[[], tuple[int, int]]  # the bit mask of the keys, and the seq of the message that said so


@dataclasses.dataclass(frozen=True)
class Beginning:
    """Where a world can begin. `png`: the same image as a file, for the page."""

    image: UInt8[np.ndarray, "H W 3"]
    prompt: str
    intrinsics: Intrinsics | None
    png: bytes


@dataclasses.dataclass(frozen=True)
class Game:
    """What is played, before a world is opened. size: height and width. fps: at which frames are shown."""

    config: ServeConfig
    name: str
    size: tuple[int, int]
    fps: float
    session: SessionConfig
    stride: int
    beginnings: tuple[Beginning, ...]

    @classmethod
    def of(cls, config: ServeConfig) -> "Game":
        """Reads the description of a run or bundle and its pictures, and no arrays.

        Raises:
          ConfigError: nothing there, damaged, or not a world that can be played.
        """
        source = find(config.run)
        world = source.config
        world.check_complete(f"run = {config.run!r}")
        kept = None if source.run else manifest.read(source.path)
        shown = [] if kept is None else [(manifest.image(source.path, p), p) for p in kept.pictures]
        made = [(image, p.prompt, p.intrinsics) for image, p in shown]
        if config.picture is not None:
            made = [(read_image(config.picture, "picture"), "", None)]
        require(bool(made), "run", config.run, "has no pictures to start from; give one with --picture=FILE")
        step = pixels_per_token(world.network)
        size = config.size or tuple(n // s * s for n, s in zip(made[0][0].shape[:2], step, strict=True))
        fits = min(size) > 0 and not any(n % s for n, s in zip(size, step, strict=True))
        require(
            fits and np.prod(size) <= MAX_PIXELS, "size", size, f"must be multiples of {step[0]}, {step[1]}"
        )
        fps = config.fps or (kept.fps if kept and kept.fps else DEFAULT_FPS)
        beginnings = tuple(_beginning(image, text or config.prompt, k, size) for image, text, k in made)
        name = source.path.name or str(source.path)
        return cls(config, name, size, fps, SessionConfig.of(world), world.codec.stride[0], beginnings)

    @property
    def chunk_frames(self) -> int:
        """Video frames of a chunk, the first of a world excepted."""
        return self.stride * self.session.causal.chunk

    def open(self) -> World:
        """Reads the arrays. Raises ConfigError."""
        dtype = self.config.dtype or ("float32" if jax.default_backend() == "cpu" else None)
        return open_world(self.config.run, default_mesh(self.config.weights), dtype)

    def uploaded(self, content: bytes) -> Beginning:
        """A picture of a client, cut to the size of the world. Raises Refused."""
        limit = self.config.max_picture_bytes
        if len(content) > limit:
            raise Refused(f"picture: {len(content)} bytes; at most {limit}")
        try:
            image = decode_image(io.BytesIO(content), "picture", self.config.max_picture_pixels)
        except ValueError as error:
            raise Refused(str(error)) from None
        return _beginning(image, self.config.prompt, self.beginnings[0].intrinsics, self.size)

    def about(self) -> dict[str, Any]:
        """What a page needs to know."""
        config = self.config
        return {
            "name": self.name,
            "height": self.size[0],
            "width": self.size[1],
            "fps": self.fps,
            "chunk_frames": self.chunk_frames,
            "keys": list(keyboard.KEYS),
            "step_size": self.session.keyboard.step_size,
            "turn_rate": self.session.keyboard.turn_rate,
            "pictures": [{"prompt": b.prompt} for b in self.beginnings],
            "events": [{"name": name, "text": text} for name, text in config.event_texts().items()],
            "limits": {
                "prompt": config.max_prompt,
                "picture_bytes": config.max_picture_bytes,
                "picture_pixels": config.max_picture_pixels,
                "moments": config.max_snapshots,
                "idle_seconds": config.idle_seconds,
                "total_seconds": config.total_seconds,
            },
            "image": f"image/{config.format}",
        }

    def encoded(self, frames: UInt8[np.ndarray, "f H W 3"]) -> list[bytes]:
        """The frames as picture files. Colour is kept at full resolution: small worlds are shown large."""
        small = self.size[0] * self.size[1] <= SMALL
        quality = self.config.quality or (97 if small else 88)
        if self.config.format == "webp":
            kind, options = ".webp", [cv2.IMWRITE_WEBP_QUALITY, 101 if quality == 100 else quality]
        else:
            full = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
            kind = ".jpg"
            options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, full]
        return [cv2.imencode(kind, frame[..., ::-1], options)[1].tobytes() for frame in frames]


def _beginning(
    image: np.ndarray, prompt: str, intrinsics: Intrinsics | None, size: tuple[int, int]
) -> Beginning:
    cut, rays = cover(image, size, None if intrinsics is None else np.float32([intrinsics]))
    file = io.BytesIO()
    Image.fromarray(cut).save(file, "PNG")
    kept = None if rays is None else tuple(float(v) for v in rays[0])
    return Beginning(cut, prompt, kept, file.getvalue())


class Play:
    """One world that is being played. All of it runs in the device's thread; nothing of it is shared with others.

    Attributes:
      running: a world has begun. prompt: the lasting one. event: the name of the one that is on, if one is. number: of
        the next frame.
    """

    def __init__(self, game: Game, world: World):
        self._game, self._session = game, Session(world, **vars(game.session))
        self._texts = game.config.event_texts()
        self._moments: dict[int, tuple[Snapshot, str, str | None, int]] = {}
        self._kept, self.number = 0, 0
        self.running, self.prompt, self.event = False, "", None

    @property
    def chunk(self) -> int:
        """Number of the next chunk."""
        return self._session.host.chunk

    @property
    def events(self) -> list[str]:
        """Names of events as the prompt has them: of the one that is on, or of those in the prompt itself."""
        return (
            [self.event]
            if self.event
            else [name for name, text in self._texts.items() if text in self.prompt]
        )

    def told(self) -> str:
        """What the world is told: the prompt, in which the text of the event stands in place of all others'."""
        if self.event is None:
            return self.prompt
        bare = self.prompt
        for text in self._texts.values():
            bare = bare.replace(text, "")
        return " ".join(f"{bare} {self._texts[self.event]}".split())

    def start(self, beginning: Beginning, prompt: str | None, seed: int) -> None:
        """Begins anew; moments that were kept stay."""
        self.prompt, self.event = self._checked(prompt or beginning.prompt), None
        rays = None if beginning.intrinsics is None else np.float64(beginning.intrinsics)
        self._session.start(beginning.image, self.prompt, seed=seed, intrinsics=rays)
        self.running, self.number = True, 0

    def set_prompt(self, prompt: str) -> None:
        """Another prompt; no event is on. Raises Refused."""
        self.prompt, self.event = self._checked(prompt), None
        self._session.set_prompt(self.prompt)

    def set_event(self, name: str, on: bool) -> None:
        """An event in place of the one before, or back to the prompt. Raises Refused."""
        if name not in self._texts:
            raise Refused(f"event: no {name!r} here; there are {', '.join(self._texts) or 'none'}")
        if on or self.event == name:
            self.event = name if on else None
            self._session.set_prompt(self.told())

    def _checked(self, prompt: str) -> str:
        limit = self._game.config.max_prompt
        if not prompt.strip() or len(prompt) > limit:
            raise Refused(f"prompt: {len(prompt)} characters; 1 to {limit}, not only white space")
        return " ".join(prompt.split())

    def keep(self) -> int:
        """Keeps this moment; returns its number. Raises Refused: too many are kept."""
        limit = self._game.config.max_snapshots
        if len(self._moments) >= limit:
            raise Refused(f"keep: {limit} moments are kept; forget one first")
        self._kept += 1
        self._moments[self._kept] = (self._session.snapshot(), self.prompt, self.event, self.number)
        return self._kept

    def restore(self, moment: int) -> None:
        """Goes on from a moment, which stays. Raises Refused: there is none of that number."""
        if moment not in self._moments:
            raise Refused(f"restore: no moment {moment}")
        snapshot, self.prompt, self.event, self.number = self._moments[moment]
        self._session.restore(snapshot)
        self.running = True

    def forget(self, moment: int) -> None:
        """Drops a moment, if it is there."""
        self._moments.pop(moment, None)

    def advance(self, held: Held) -> tuple[UInt8[np.ndarray, "f H W 3"], list[Frame]]:
        """The next chunk under the keys that `held` gives at this moment, as late as can be: video, and a header per
        frame."""
        session = self._session
        down, seq = held()
        row = np.array([bool(down >> i & 1) for i in range(len(keyboard.KEYS))])
        start, chunk, opening = session.host.c2w, session.host.chunk, session.host.chunk == 0
        rows = np.concatenate([np.zeros((1, 8), bool), np.tile(row, (session.transitions, 1))])
        frames = session.step(rows[1:])
        do = session.config.keyboard
        path = keyboard.integrate(rows, start, do.step_size, do.turn_rate, do.turn_rate)
        made = []
        poses = _places(path if opening else path[1:])
        keys = rows if opening else rows[1:]
        for place, (pose, pressed) in enumerate(zip(poses, keys, strict=True)):
            mask = int(np.packbits(pressed, bitorder="little")[0])
            made.append(Frame(mask, place, self.number, chunk, seq, *pose))
            self.number = (self.number + 1) % 2**32
        return frames, made

    def arrays(self) -> Any:
        """A copy of what a session holds on the device."""
        snapshot = self._session.snapshot()
        return snapshot.device, snapshot.stream

    def close(self) -> None:
        """Frees the memory of the device."""
        self._session.close()
        self._moments.clear()
        self.running = False


def _places(c2w: Float64[np.ndarray, "f 4 4"]) -> Iterable[tuple[float, float, float, float]]:
    """x, z, yaw and pitch of each pose, for the map."""
    forward, _ = keyboard.headings(c2w[:, :3, :3])
    yaw = np.arctan2(forward[:, 0], forward[:, 2])
    columns = (c2w[:, 0, 3], c2w[:, 2, 3], yaw, keyboard.elevation(c2w[:, :3, :3]))
    return [tuple(map(float, row)) for row in zip(*columns, strict=True)]


def held_still() -> tuple[int, int]:
    """No keys."""
    return 0, 0


def warm(game: Game, world: World) -> None:
    """Runs everything that a session can ask for, so that it is compiled before the first player comes."""
    play = Play(game, world)
    play.start(game.beginnings[0], None, 0)
    for _ in range(3):
        play.advance(held_still)
    play.restore(play.keep()) if game.config.max_snapshots else None
    play.set_prompt(play.prompt)
    play.advance(held_still)
    play.close()
