"""A tiny bundle that can be played, and a server of it in this process."""

import asyncio
import dataclasses
import pathlib
import threading

import numpy as np
from etils import epath

from lingbot_jax.serve import server
from lingbot_jax.serve.config import ServeConfig
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
    starts = [(image, f"hall {i}", (16.0, 16.0, 16.0, 8.0)) for i, image in enumerate(images)]
    manifest.write(epath.Path(path), {BUNDLE: bundle_text(PLAYED).encode()}, 16.0, starts)
    return path


class Running:
    """A server in a thread of its own, on a free port."""

    def __init__(self, config: ServeConfig):
        self._config = dataclasses.replace(config, port=0)
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.error: BaseException | None = None

    def _run(self) -> None:
        async def serve():
            game = server.Game.of(self._config)
            await server.serve(game, on_ready=self._ready)

        try:
            asyncio.run(serve())
        except BaseException as error:
            self.error = error
        self._started.set()

    def _ready(self, port: int, uvicorn_server: server.Server) -> None:
        self.port, self.server = port, uvicorn_server
        self._started.set()

    def __enter__(self) -> "Running":
        self._thread.start()
        self._started.wait()
        if self.error is not None:
            raise self.error
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(20)
