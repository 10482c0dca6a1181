"""The short form of `python -m tests.bench load`: a crowd that does not behave, and those in it who do."""

import asyncio

import pytest

from lingbot_jax.serve import game as games
from tests.serve import abuse, scripted
from tests.serve.worlds import Client, Running, config


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(games, "Session", scripted.ScriptedSession)
    made = scripted.game(config(fps=20.0, max_sessions=6, max_picture_bytes=1 << 20, stall_seconds=1.0))
    with Running(made) as running:
        yield running


def test_who_behaves_is_served_or_told_busy(server):
    tally = asyncio.run(abuse.crowd(f"ws://127.0.0.1:{server.port}/ws", clients=8, seconds=4.0, patience=1.0))
    assert not tally.wronged
    assert tally.counts["served"] > 0 and tally.counts["thrown out"] > 0


def test_fuzzed_messages_are_answered_or_ignored(server):
    """And one who plays meanwhile misses nothing: its frames come in order, every one."""
    url = f"ws://127.0.0.1:{server.port}/ws"

    async def play() -> None:
        async with server.connect() as socket:
            client = Client(socket)
            await client.begin()
            fuzzing = asyncio.create_task(abuse.fuzz(url, 600))
            while not fuzzing.done():
                await client.watch(4)
            numbers = [f.number for f in client.frames]
            assert numbers == list(range(len(numbers)))
            assert fuzzing.result().counts["thrown out"] > 0

    asyncio.run(play())
