"""A tiny bundle that can be played, a server in this process, and a client of it."""

import asyncio
import dataclasses
import json
import pathlib
import threading
from typing import Any

import numpy as np
from etils import epath
from websockets.asyncio.client import ClientConnection, connect

from lingbot_jax.serve import server
from lingbot_jax.serve.config import ServeConfig
from lingbot_jax.serve.game import Game
from lingbot_jax.serve.messages import HEADER, SUBPROTOCOL
from lingbot_jax.worlds import manifest
from lingbot_jax.worlds.config import CausalConfig
from lingbot_jax.worlds.open import BUNDLE, bundle_text
from tests.rollout.worlds import TINY_WORLD, world, write_bundle

PLAYED = dataclasses.replace(TINY_WORLD, causal=CausalConfig(chunk=1, window=4, sink=1, levels=(0, 500)))
SIZE = (16, 32)


def make_bundle(folder: pathlib.Path, pictures: int = 2) -> pathlib.Path:
    """A world of chunks of one latent frame, with noise to start from."""
    path = write_bundle(folder / "tiny", world(PLAYED))
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*SIZE, 3), np.uint8) for _ in range(pictures)]
    shown = tuple((image, f"hall {i}", (24.0, 20.0, 15.0, 8.0)) for i, image in enumerate(images))
    manifest.write(epath.Path(path), {BUNDLE: bundle_text(PLAYED).encode()}, manifest.Starts(shown, 16.0))
    return path


class Running:
    """A server of a game, in a thread of its own, on a free port. Stops at the end of the block."""

    def __init__(self, game: Game):
        self._game = dataclasses.replace(game, config=dataclasses.replace(game.config, port=0))
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: BaseException | None = None

    def _run(self) -> None:
        def ready(port: int, running: server.Server) -> None:
            self.port, self.server = port, running
            self._ready.set()

        try:
            asyncio.run(server.serve(self._game, ready))
        except BaseException as error:  # is raised again in the thread that waits
            self._error = error
            self._ready.set()

    def __enter__(self) -> "Running":
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            raise self._error
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join()

    def connect(self, **options: Any) -> connect:
        """A WebSocket; `options` of the client library."""
        options = {"subprotocols": [SUBPROTOCOL], "max_size": 1 << 24} | options
        return connect(f"ws://127.0.0.1:{self.port}/ws", **options)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@dataclasses.dataclass(frozen=True)
class Shown:
    """A frame that came: see `serve.messages`."""

    keys: int
    place: int
    number: int
    chunk: int
    seq: int
    pose: tuple[float, float, float, float]
    picture: bytes


class Client:
    """A player that does as the page does."""

    def __init__(self, socket: ClientConnection):
        self.socket, self.frames, self.said, self._seq = socket, [], [], 0

    async def say(self, kind: str, **fields: Any) -> None:
        await self.socket.send(json.dumps({"type": kind, **fields}))

    async def keys(self, down: int) -> int:
        """Says which keys are down; returns the number of the message."""
        self._seq += 1
        await self.say("keys", seq=self._seq, down=down)
        return self._seq

    async def hear(self) -> dict[str, Any] | Shown:
        """The next message or frame. Frames are acknowledged."""
        data = await asyncio.wait_for(self.socket.recv(), 60)
        if isinstance(data, str):
            self.said.append(json.loads(data))
            return self.said[-1]
        version, keys, place, number, chunk, seq, _, *pose = HEADER.unpack_from(data)
        assert version == 1
        self.frames.append(Shown(keys, place, number, chunk, seq, tuple(pose), data[HEADER.size :]))
        if len(self.frames) % 4 == 1:
            await self.say("ping", t=0, shown=len(self.frames))
        return self.frames[-1]

    async def until(self, kind: str) -> dict[str, Any]:
        """Reads until a message of that kind."""
        while True:
            heard = await self.hear()
            if isinstance(heard, dict) and heard["type"] == kind:
                return heard

    async def watch(self, frames: int) -> list[Shown]:
        """Reads so many frames."""
        before = len(self.frames)
        while len(self.frames) < before + frames:
            await self.hear()
        return self.frames[before:]

    async def begin(self, **fields: Any) -> None:
        """Starts a world, once the server is ready, and waits for it."""
        await self.until("ready")
        await self.say("start", **fields)
        await self.until("started")


def config(**fields: Any) -> ServeConfig:
    """Of a quick server for tests."""
    return ServeConfig(**{"fps": 100.0, "drain_seconds": 0.2} | fields)
