"""Runs the application: opens the world while the page is already there, and drains on SIGTERM."""

import asyncio
import functools
import json
import socket
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from types import FrameType

import jax
import uvicorn

from lingbot_jax.config import ConfigError
from lingbot_jax.serve.app import make_app
from lingbot_jax.serve.config import ServeConfig
from lingbot_jax.serve.device import Device
from lingbot_jax.serve.game import Game, Play, held_still, warm
from lingbot_jax.serve.metrics import Metrics


class Server(uvicorn.Server):
    """Uvicorn, which on SIGTERM or Ctrl-C first lets sessions come to an end. A second signal does not wait."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]]):
        super().__init__(config)
        self._drain, self._draining = drain, False

    async def serve(self, sockets=None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining:
            self.should_exit = self.force_exit = True
            return
        self._draining = True
        asyncio.run_coroutine_threadsafe(self._leave(), self._loop)

    async def _leave(self) -> None:
        await self._drain()
        self.should_exit = True


def run(config: ServeConfig) -> None:
    """Serves until SIGTERM or Ctrl-C.

    Raises:
      ConfigError: nothing to play, or an address that is taken.
    """
    # Small programs too: there are many, and together they are most of the time of a start.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    game = Game.of(config)
    if config.check:
        print(json.dumps(check(game)))
        return
    print(f"opening {config.run} ...", file=sys.stderr, flush=True)
    asyncio.run(serve(game, functools.partial(say, game)))


async def serve(game: Game, on_ready: Callable[[int, Server], None]) -> None:
    """Serves until the server is told to stop.

    Args:
      on_ready: is called with port and server when the world is warm. The page is there before.

    Raises:
      ConfigError: an address that is taken, or a world that cannot be opened.
    """
    config, metrics = game.config, Metrics()
    device = Device(game, metrics)
    app, hub = make_app(game, device, metrics)
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        ws="websockets-sansio",
        ws_max_size=config.max_picture_bytes + 1024,
        ws_per_message_deflate=False,  # frames are compressed, and a small message must not unpack to a large one
        timeout_keep_alive=15,
        timeout_graceful_shutdown=5,
        limit_concurrency=4 * config.max_sessions + 64,
    )
    listening = _listen(config)
    server = Server(settings, hub.drain)
    opened = device.begin()

    def done(_: asyncio.Future) -> None:
        if opened.cancelled() or opened.exception() is not None:
            server.should_exit = True
        else:
            on_ready(listening.getsockname()[1], server)

    opened.add_done_callback(done)
    try:
        await server.serve([listening])
    finally:
        device.close()
    if opened.done() and not opened.cancelled() and opened.exception() is not None:
        raise opened.exception()


def _listen(config: ServeConfig) -> socket.socket:
    """A listening socket. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    made = socket.socket(family)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((config.host, config.port))
    except OSError as error:
        made.close()
        raise ConfigError(
            f"port = {config.port}: cannot listen on {config.host} ({error.strerror})"
        ) from None
    return made


def say(game: Game, port: int, _: Server) -> None:
    """Prints where the page is."""
    config = game.config
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    token = f"#token={config.token}" if config.token else ""
    print(f"walk through {game.name}: http://{host}:{port}/{token}", file=sys.stderr, flush=True)


def check(game: Game) -> dict[str, object]:
    """Opens and warms the world, plays some chunks, and says how fast: what fills the compilation cache of an image."""
    began = time.monotonic()
    world = game.open()
    warm(game, world)
    warmed, play, seconds = time.monotonic() - began, Play(game, world), []
    play.start(game.beginnings[0], None, 0)
    for _ in range(12):
        start = time.monotonic()
        game.encoded(play.advance(held_still)[0])
        seconds.append(time.monotonic() - start)
    chunk = statistics.median(seconds[2:])
    held = sum(array.nbytes for array in jax.tree.leaves(play.arrays()))
    return {
        "name": game.name,
        "seconds_to_open": round(warmed, 2),
        "chunk_ms": round(1000 * chunk, 1),
        "frames_per_second": round(game.chunk_frames / chunk, 1),
        "sessions_at_pace": int(game.chunk_frames / game.fps / chunk),
        "session_mebibytes": round(held / 2**20, 2),
    }
