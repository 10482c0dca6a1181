"""Clients that behave and clients that do not, against a server on this machine.

    python -m tests.bench load --minutes=60 --clients=20        # docs/serving.md
    python -m tests.bench load --fuzz=100000

Every client that behaves must be served or be told that all places are taken; nothing that the others do may matter.
"""

import asyncio
import collections
import dataclasses
import json
import random

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus

from tests.serve.worlds import Client

GONE = (ConnectionClosed, InvalidMessage, InvalidStatus, ConnectionError, EOFError)
VALID = (
    {"type": "start", "picture": 0, "seed": 3},
    {"type": "keys", "seq": 1, "down": 5},
    {"type": "prompt", "text": "a yard"},
    {"type": "event", "name": "night", "on": True},
    {"type": "keep"},
    {"type": "restore", "moment": 1},
    {"type": "forget", "moment": 1},
    {"type": "pause", "on": False},
    {"type": "ping", "t": 1.5, "shown": 2},
)


@dataclasses.dataclass
class Tally:
    """What became of the clients. `wronged`: behaved, and were neither served nor told busy."""

    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    wronged: list[str] = dataclasses.field(default_factory=list)
    frames: int = 0


def fuzzed(rng: random.Random) -> str | bytes:
    """A message that is nearly right, or nothing like one."""
    kind = rng.random()
    if kind < 0.1:
        return rng.randbytes(rng.randrange(200))
    if kind < 0.2:
        return "".join(chr(rng.randrange(1, 0xD000)) for _ in range(rng.randrange(60)))
    message = dict(rng.choice(VALID))
    values = (
        None,
        -1,
        2**70,
        0.5,
        True,
        "x" * rng.randrange(3000),
        [],
        {},
        [[[]]],
        "../../etc/passwd",
        "\u0000",
    )
    for _ in range(rng.randrange(3)):
        message[rng.choice([*message, "extra", "type"])] = rng.choice(values)
    text = json.dumps(message)
    if kind < 0.4:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice('{}[]",:\\0x') + text[at + 1 :]
    return text


async def behaves(url: str, rng: random.Random, tally: Tally, seconds: float) -> None:
    """Plays for some time, as the page does."""
    try:
        async with connect(url, max_size=1 << 24) as socket:
            client = Client(socket)
            heard = await client.hear()
            if heard["type"] == "busy":
                tally.counts["busy"] += 1
                return
            await client.begin(seed=rng.randrange(2**32))
            end = asyncio.get_running_loop().time() + seconds
            while asyncio.get_running_loop().time() < end:
                await client.keys(rng.randrange(256))
                await client.watch(rng.randrange(1, 12))
            tally.counts["served"] += 1
            tally.frames += len(client.frames)
    except (*GONE, TimeoutError, AssertionError) as error:
        tally.wronged.append(repr(error))


async def talks_nonsense(url: str, rng: random.Random, tally: Tally, messages: int) -> None:
    """Sends what no page would, and waits until all of it was looked at, or until it is thrown out."""
    try:
        async with connect(url, max_size=1 << 24, close_timeout=1) as socket:

            async def looked_at() -> None:
                async for answer in socket:
                    if isinstance(answer, str) and json.loads(answer) == {"type": "pong", "t": -1}:
                        return

            reading = asyncio.create_task(looked_at())
            for _ in range(messages):
                tally.counts["nonsense"] += 1
                await socket.send(fuzzed(rng))
            await socket.send(json.dumps({"type": "ping", "t": -1, "shown": 0}))
            await reading
            socket.transport.abort()
            tally.counts["heard out"] += 1
    except GONE:
        tally.counts["thrown out"] += 1


async def sends_too_much(url: str, rng: random.Random, tally: Tally, size: int = 9 << 20) -> None:
    """A message larger than any may be."""
    try:
        async with connect(url, max_size=1 << 24) as socket:
            await socket.send(bytes(size) if rng.random() < 0.5 else "x" * size)
            async for _ in socket:
                await asyncio.sleep(0)
    except GONE:
        tally.counts["thrown out"] += 1


async def never_reads(url: str, rng: random.Random, tally: Tally, seconds: float) -> None:
    """Begins a world and lets its frames lie."""
    try:
        async with connect(url, max_queue=1) as socket:
            await socket.send(json.dumps({"type": "start"}))
            await asyncio.sleep(seconds)
            socket.transport.abort()
            tally.counts["slow"] += 1
    except GONE:
        tally.counts["thrown out"] += 1


async def vanishes(url: str, rng: random.Random, tally: Tally) -> None:
    """Is gone in the middle of a handshake, or of a frame."""
    host, port = url.removeprefix("ws://").split("/")[0].split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"GET /ws HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    writer.write(
        (head + key)[: rng.randrange(10, len(head + key) + 1)].encode() + rng.randbytes(rng.randrange(8))
    )
    await asyncio.sleep(rng.random() * 0.2)
    writer.transport.abort()
    tally.counts["vanished"] += 1


async def crowd(url: str, clients: int, seconds: float, seed: int = 0, patience: float = 5.0) -> Tally:
    """So many clients at a time, for so long: half of them behave.

    Args:
      patience: seconds at most that a client plays.
    """
    tally, end = Tally(), asyncio.get_running_loop().time() + seconds

    async def one(number: int) -> None:
        rng = random.Random(1000 * seed + number)
        while asyncio.get_running_loop().time() < end:
            await asyncio.sleep(rng.random() * 0.3)
            if number % 2 == 0:
                await behaves(url, rng, tally, rng.random() * patience)
                continue
            await rng.choice(
                [
                    lambda: talks_nonsense(url, rng, tally, 150),
                    lambda: sends_too_much(url, rng, tally),
                    lambda: never_reads(url, rng, tally, rng.random() * patience),
                    lambda: vanishes(url, rng, tally),
                ]
            )()

    await asyncio.gather(*(one(number) for number in range(clients)))
    return tally


async def fuzz(url: str, messages: int, at_once: int = 1, seed: int = 0) -> Tally:
    """So many messages of nonsense in all, over as many connections as they take."""
    tally = Tally()

    async def one(number: int) -> None:
        rng = random.Random(1000 * seed + number)
        while tally.counts["nonsense"] < messages:
            await talks_nonsense(url, rng, tally, 400)

    await asyncio.gather(*map(one, range(at_once)))
    return tally
