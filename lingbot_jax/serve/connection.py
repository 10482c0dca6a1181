"""One client: what it says, what it is sent, and the clock of its world.

Three tasks per client. `_listen` reads messages: keys change what the next chunk sees, everything that changes the
world waits in a short queue. `_play` empties that queue and makes chunk after chunk, each when its time has come, or
earlier when the keys changed. `_send` sends what is ready. Whatever ends one of them ends the client and nobody else.
"""

import asyncio
import collections
import logging
import time

from starlette.websockets import WebSocket, WebSocketDisconnect

from lingbot_jax.serve import messages
from lingbot_jax.serve.device import Device
from lingbot_jax.serve.game import Beginning, Game, Play
from lingbot_jax.serve.messages import Refused
from lingbot_jax.serve.metrics import Metrics

_log = logging.getLogger(__name__)

MAX_WAITING = 16  # commands that wait for the chunk in work
MAX_REFUSED = 100  # messages in a session: more is no mistake
AHEAD = 2.0  # seconds of frames that were sent and not yet acknowledged: then the world waits
PER_SECOND = 100  # messages that are read; more wait in the client's own socket
POLICY, BUSY, RESTART, FAILED, NORMAL = 1008, 1013, 1012, 1011, 1000  # closing codes of WebSockets


class Ended(Exception):
    """The session is over. `why` in one word, with the closing code."""

    def __init__(self, why: str, code: int):
        super().__init__(why)
        self.why, self.code = why, code


class Outbox:
    """What is to be sent: messages in order, and at most so many frames, of which the oldest give way.

    Attributes:
      dropped: frames that gave way.
    """

    def __init__(self, frames: int):
        self._texts: collections.deque[str] = collections.deque()
        self._frames: collections.deque[bytes] = collections.deque(maxlen=frames)
        self._ready = asyncio.Event()
        self.dropped = 0

    def text(self, kind: str, **fields: object) -> None:
        """Raises Ended: the client takes nothing."""
        if len(self._texts) >= 4 * MAX_WAITING:
            raise Ended("stalled", POLICY)
        self._texts.append(messages.to_json(kind, **fields))
        self._ready.set()

    def frame(self, packed: bytes) -> None:
        self.dropped += len(self._frames) == self._frames.maxlen
        self._frames.append(packed)
        self._ready.set()

    def clear(self) -> None:
        """Forgets frames of a world that is no more."""
        self._frames.clear()

    async def take(self) -> str | bytes:
        """The next thing to send: messages before frames."""
        while not (self._texts or self._frames):
            self._ready.clear()
            await self._ready.wait()
        return self._texts.popleft() if self._texts else self._frames.popleft()


class Connection:
    """A client that was given a place."""

    def __init__(self, socket: WebSocket, game: Game, device: Device, metrics: Metrics):
        self._socket, self._game, self._device, self._metrics = socket, game, device, metrics
        self._config, self._play_state = game.config, None
        self._outbox = Outbox(2 * game.chunk_frames)
        self._waiting: collections.deque[messages.Command] = collections.deque()
        self._wake = asyncio.Event()
        self._upload: Beginning | None = None
        self._down, self._tapped, self._seq = 0, 0, 0
        self._pressed_at: float | None = None
        self._paused, self._refused, self._ending = False, 0, None
        self._sent, self._shown, self._shown_at = 0, 0, 0.0
        self._began = self._active = time.monotonic()

    async def run(self) -> str:
        """Serves the client until it ends; returns why."""
        self._outbox.text("hello", game=self._game.about(), ready=self._device.ready)
        tasks = [asyncio.create_task(t) for t in (self._listen(), self._play(), self._send(), self._watch())]
        why, code = "failed", FAILED
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            error = next(task.exception() for task in done if task.exception())
            if isinstance(error, Ended):
                why, code = error.why, error.code
            elif isinstance(error, WebSocketDisconnect | OSError):
                why, code = "left", None
            else:
                _log.error("a session failed; the others go on", exc_info=error)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._play_state is not None:
                await self._device.finish(self._play_state.close)
        if code is not None:
            await say_goodbye(self._socket, why, code)
        return why

    def end(self, why: str, code: int) -> None:
        """Ends the session from outside."""
        self._ending = Ended(why, code)

    def tell(self, kind: str, **fields: object) -> None:
        """Sends a message from outside."""
        self._outbox.text(kind, **fields)

    # --- Listening.

    async def _listen(self) -> None:
        allowance, at = float(PER_SECOND), time.monotonic()
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                raise Ended("left", NORMAL)
            now = time.monotonic()
            allowance, at = min(allowance + (now - at) * PER_SECOND, PER_SECOND) - 1, now
            if allowance < 0:  # the client's own socket is where the rest waits
                await asyncio.sleep(-allowance / PER_SECOND)
            try:
                if message.get("bytes") is not None:
                    await self._take_picture(message["bytes"])
                else:
                    self._hear(messages.parse(message.get("text") or ""))
            except Refused as error:
                self._refuse(str(error))

    def _refuse(self, why: str) -> None:
        self._metrics.invalid.inc()
        self._refused += 1
        if self._refused > MAX_REFUSED:
            raise Ended("refused", POLICY)
        self._outbox.text("error", message=why)

    async def _take_picture(self, content: bytes) -> None:
        self._active = time.monotonic()
        self._upload = await asyncio.to_thread(self._game.uploaded, content)
        self._outbox.text("uploaded", width=self._game.size[1], height=self._game.size[0])

    def _hear(self, command: messages.Command) -> None:
        now = time.monotonic()
        if isinstance(command, messages.Ping):
            if self._shown < command.shown <= self._sent:
                self._shown, self._shown_at = command.shown, now
            self._outbox.text("pong", t=command.t)
            return
        self._active = now
        if isinstance(command, messages.Keys):
            changed = command.down != self._down
            self._down, self._seq = command.down, command.seq
            self._tapped |= command.down
            if changed:
                self._pressed_at = self._pressed_at or now
                self._wake.set()
            return
        if isinstance(command, messages.Pause):
            self._paused = command.on
        elif len(self._waiting) >= MAX_WAITING:
            raise Refused(f"{command.type}: {MAX_WAITING} commands are waiting; slower")
        else:
            self._waiting.append(command)
        self._wake.set()

    def _held(self) -> tuple[int, int]:
        """Keys that are down, or were since the chunk before: a short tap counts. Called by the device's thread."""
        keys, self._tapped = self._down | self._tapped, self._down
        return keys, self._seq

    # --- Playing.

    async def _play(self) -> None:
        await self._device.warmed()
        self._outbox.text("ready")
        self._play_state = play = Play(self._game, self._device.world)
        due = started = 0.0
        while True:
            while self._waiting:
                await self._obey(play, self._waiting.popleft())
            now = time.monotonic()
            if not play.running or self._paused or self._too_far_ahead():
                await self._woken(0.1 if play.running and not self._paused else None)
                due = max(due, time.monotonic())
                continue
            period = self._game.chunk_frames / self._game.fps
            earliest = started + period / 2 if self._pressed_at is not None else due
            if now < earliest:
                await self._woken(earliest - now)
                continue
            self._metrics.late.inc(now > due + period / 2)
            started, pressed, self._pressed_at = now, self._pressed_at, None
            frames, heads = await self._device.run(play.advance, self._held)
            pictures = await asyncio.to_thread(self._game.encoded, frames)
            self._post(heads, pictures)
            if pressed is not None:
                self._metrics.answer.observe(time.monotonic() - pressed)
            length = len(heads) / self._game.fps
            # On time: by the clock. Late: catch up at twice the pace at most. Early: the clock begins again here.
            due = min(max(due + length, started + length / 2), started + length)

    async def _woken(self, seconds: float | None) -> None:
        """Waits until something changes, or so long."""
        self._wake.clear()
        try:
            await asyncio.wait_for(self._wake.wait(), seconds)
        except TimeoutError:
            return

    def _too_far_ahead(self) -> bool:
        return self._sent - self._shown > AHEAD * self._game.fps + self._game.chunk_frames

    def _post(self, heads: list[messages.Frame], pictures: list[bytes]) -> None:
        before, now = self._outbox.dropped, 1000 * time.monotonic()
        for head, picture in zip(heads, pictures, strict=True):
            self._outbox.frame(head.packed(picture, now))
        self._metrics.frames.inc(len(heads))
        self._metrics.dropped.inc(self._outbox.dropped - before)

    async def _obey(self, play: Play, command: messages.Command) -> None:
        run, say = self._device.run, self._outbox.text
        try:
            match command:
                case messages.Start(picture=chosen, prompt=prompt, seed=seed):
                    await run(play.start, self._beginning(chosen), prompt, seed)
                    self._outbox.clear()
                    say("started", prompt=play.prompt, events=play.events, seed=seed)
                case messages.Prompt(text=text):
                    self._need(play)
                    await run(play.set_prompt, text)
                    say("prompted", prompt=play.prompt, events=play.events, chunk=play.chunk)
                case messages.Event(name=name, on=on):
                    self._need(play)
                    await run(play.set_event, name, on)
                    say("prompted", prompt=play.prompt, events=play.events, chunk=play.chunk)
                case messages.Keep():
                    self._need(play)
                    say("kept", moment=await run(play.keep), number=play.number)
                case messages.Restore(moment=moment):
                    await run(play.restore, moment)
                    self._outbox.clear()
                    say("restored", moment=moment, prompt=play.prompt, events=play.events)
                case messages.Forget(moment=moment):
                    await run(play.forget, moment)
                    say("forgotten", moment=moment)
        except Refused as error:
            self._refuse(str(error))

    def _need(self, play: Play) -> None:
        if not play.running:
            raise Refused("no world has begun; start first")

    def _beginning(self, chosen: int | str) -> Beginning:
        if chosen == "upload":
            if self._upload is None:
                raise Refused("start: no picture was uploaded")
            return self._upload
        known = self._game.beginnings
        if chosen >= len(known):
            raise Refused(f"start: picture {chosen}: there are {len(known)}, counted from 0")
        return known[chosen]

    # --- Sending, and its limits.

    async def _send(self) -> None:
        while True:
            item = await self._outbox.take()
            if isinstance(item, bytes):
                self._sent += 1
                await self._socket.send_bytes(item)
            else:
                await self._socket.send_text(item)

    async def _watch(self) -> None:
        config = self._config
        self._shown_at = time.monotonic()
        while True:
            await asyncio.sleep(0.2)
            now = time.monotonic()
            if self._ending is not None:
                raise self._ending
            if self._sent == self._shown:
                self._shown_at = now
            if now - self._shown_at > config.stall_seconds:
                raise Ended("stalled", POLICY)
            if now - self._active > config.idle_seconds:
                raise Ended("idle", NORMAL)
            if now - self._began > config.total_seconds:
                raise Ended("over", NORMAL)


async def say_goodbye(socket: WebSocket, why: str, code: int) -> None:
    """Says why and closes; a client that does not listen is left."""
    try:
        async with asyncio.timeout(2.0):
            await socket.send_text(messages.to_json("bye", why=why))
            await socket.close(code, why)
    except (TimeoutError, RuntimeError, OSError, WebSocketDisconnect) as error:
        _log.debug("no goodbye: %s", error)
