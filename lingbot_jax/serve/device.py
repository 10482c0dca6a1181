"""The one thread that works the device: chunks of all sessions in the order in which their time came."""

import asyncio
import concurrent.futures
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from lingbot_jax.serve import game as games
from lingbot_jax.serve.game import Game
from lingbot_jax.serve.metrics import Metrics
from lingbot_jax.worlds.world import World

P = ParamSpec("P")
R = TypeVar("R")


class Device:
    """Work is done one piece after another, first come first served: a session has one piece at a time in the queue, so
    that all get the same share.

    Attributes:
      world: once `warmed` has returned.
    """

    def __init__(self, game: Game, metrics: Metrics):
        self._game, self._metrics = game, metrics
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="device")
        self._opened: asyncio.Future[None] | None = None
        self.world: World | None = None

    @property
    def ready(self) -> bool:
        return self._opened is not None and self._opened.done() and self._opened.exception() is None

    def begin(self) -> asyncio.Future[None]:
        """Starts to open and warm the world; the future ends with it, or with what went wrong."""
        self._opened = asyncio.get_running_loop().run_in_executor(self._thread, self._open)
        return self._opened

    def _open(self) -> None:
        self.world = self._game.open()
        games.warm(self._game, self.world)

    async def warmed(self) -> None:
        """Waits until the world is open and warm."""
        await asyncio.shield(self._opened)

    async def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Does a piece of work in its turn."""
        asked = time.monotonic()

        def timed() -> R:
            began = time.monotonic()
            try:
                return work(*args, **kwargs)
            finally:
                spent = time.monotonic() - began
                self._metrics.wait.observe(began - asked)
                self._metrics.device_seconds.inc(spent)
                if getattr(work, "__name__", "") == "advance":
                    self._metrics.chunk.observe(spent)

        return await asyncio.get_running_loop().run_in_executor(self._thread, timed)

    async def finish(self, work: Callable[[], None]) -> None:
        """Does a last piece of work whatever becomes of the caller."""
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, work))

    def close(self) -> None:
        """Drops what has not begun, and waits for what has."""
        self._thread.shutdown(cancel_futures=True)
