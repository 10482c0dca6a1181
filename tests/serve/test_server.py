"""A server and its clients over real sockets: play, moments, pictures, capacity, limits, and who may come."""

import asyncio
import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image
from websockets.asyncio import client as websockets
from websockets.exceptions import ConnectionClosed, InvalidStatus

from lingbot_jax.config import ConfigError
from lingbot_jax.serve import game as games
from lingbot_jax.serve.game import Game
from tests.serve import scripted
from tests.serve.worlds import Client, Running, config, make_bundle

W, J, L = 1, 1 << 5, 1 << 7


@pytest.fixture
def courtyard(monkeypatch):
    """Makes games whose sessions are drawn by a ray caster."""
    monkeypatch.setattr(games, "Session", scripted.ScriptedSession)
    return lambda **fields: scripted.game(config(**fields))


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)


def fetch(url: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def metric(server: Running, name: str) -> float:
    lines = fetch(server.url("/metrics"))[1].decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"lingbot_{name}"))


def test_a_bundle_is_played(tmp_path):
    """The network itself, from a folder: its first frame is the picture, keys lead where they lead a session."""
    game = Game.of(config(run=str(make_bundle(tmp_path)), format="webp", quality=100))

    async def play(server: Running) -> None:
        async with server.connect() as socket:
            client = Client(socket)
            await client.begin(picture=1, seed=5)
            await client.watch(9)
            seq = await client.keys(W | L)
            frames = await client.watch(72)
            under = [f for f in frames if f.seq == seq]
            assert {f.keys for f in under} == {W | L} and under[0].place == 0
            assert [f.number for f in client.frames] == list(range(81))
            assert under[-1].pose[2] == pytest.approx(np.radians(2.0) * len(under), abs=1e-4)
        session = game.open().session()
        begin = game.beginnings[1]
        session.start(begin.image, "hall 1", seed=5, intrinsics=np.float64(begin.intrinsics))
        still = np.concatenate([session.step(np.zeros(8, bool)) for _ in range(3)])
        came = np.stack([pixels(f.picture) for f in client.frames[:9]])
        assert np.abs(came - still).max() <= 1 and (came[0] == still[0]).all()

    with Running(game) as server:
        asyncio.run(play(server))


def test_prompts_events_and_moments(courtyard):
    async def play(server: Running) -> None:
        async with server.connect() as socket:
            client = Client(socket)
            await client.begin()
            day = pixels((await client.watch(8))[-1].picture).mean()
            await client.say("keep")
            kept = await client.until("kept")
            assert kept["moment"] == 1
            await client.say("event", name="night", on=True)
            told = await client.until("prompted")
            assert told["events"] == ["night"] and told["prompt"] == "a courtyard of blocks"
            await client.watch(12)
            dark = [pixels(f.picture).mean() for f in client.frames if f.chunk >= told["chunk"]]
            assert max(dark) < 0.6 * day
            await client.keys(W)
            away = (await client.watch(40))[-1]
            assert away.pose[1] > 0.5
            await client.keys(0)
            await client.say("restore", moment=1)
            back = await client.until("restored")
            assert back["events"] == []
            frame = (await client.watch(1))[0]
            assert frame.number == kept["number"] and abs(frame.pose[1]) < 0.1
            assert pixels(frame.picture).mean() == pytest.approx(day, rel=0.02)
            await client.say("prompt", text="  a  yard in snow ")
            assert (await client.until("prompted"))["prompt"] == "a yard in snow"
            for wrong, why in (
                (
                    {"kind": "event", "name": "rain", "on": True},
                    "event: no 'rain' here; there are sun, dusk, night, fog, snow",
                ),
                ({"kind": "restore", "moment": 9}, "restore: no moment 9"),
                ({"kind": "prompt", "text": " "}, "prompt: 1 characters; 1 to 400, not only white space"),
                ({"kind": "start", "picture": 99}, "start: picture 99: there are 3, counted from 0"),
            ):
                await client.say(**wrong)
                assert (await client.until("error"))["message"] == why
            await client.watch(4)  # and it goes on

    with Running(courtyard(max_snapshots=1)) as server:
        asyncio.run(play(server))


def test_an_event_stands_in_place_of_what_the_prompt_says(courtyard):
    play = games.Play(courtyard(), None)
    play.start(play._game.beginnings[0], "A yard. It is sunny. Birds.", 0)
    assert play.events == ["sun"] and play.told() == "A yard. It is sunny. Birds."
    play.set_event("night", True)
    assert play.events == ["night"] and play.told() == "A yard. Birds. It is night."
    play.set_event("snow", False)  # was not on
    assert play.events == ["night"]
    play.set_event("night", False)
    assert play.events == ["sun"] and play._session.host.prompt == "A yard. It is sunny. Birds."


def test_a_tap_between_two_chunks_counts(courtyard):
    async def play(server: Running) -> None:
        async with server.connect() as socket:
            client = Client(socket)
            await client.begin()
            await client.watch(1)
            await client.keys(J)
            await client.keys(0)
            turned = [f for f in await client.watch(16) if f.keys == J]
            assert len(turned) == 4

    with Running(courtyard(fps=40.0)) as server:
        asyncio.run(play(server))


def upload(kind: str, size: tuple[int, int] = (90, 50)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 40, 40)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_uploaded_picture_begins_a_world(courtyard, kind):
    async def play(server: Running) -> None:
        async with server.connect() as socket:
            client = Client(socket)
            await client.until("ready")
            await client.say("start", picture="upload")
            assert "no picture was uploaded" in (await client.until("error"))["message"]
            await socket.send(upload(kind))
            await client.until("uploaded")
            await client.say("start", picture="upload", prompt="a red place")
            assert (await client.until("started"))["prompt"] == "a red place"
            await client.watch(4)

    with Running(courtyard()) as server:
        asyncio.run(play(server))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not an image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not an image|damaged"),
        (upload("PNG")[:-40], "damaged"),
        (upload("PNG", (1300, 1000)), "1300x1000 is more than 1 megapixels"),
        (b"GIF89a" + bytes(70_000), "picture: 70006 bytes; at most 60000"),
    ],
)
def test_pictures_that_are_refused(courtyard, content, why):
    with pytest.raises(games.Refused, match=why):
        courtyard(max_picture_bytes=60_000, max_picture_pixels=1_000_000).uploaded(content)


def test_sigterm_lets_sessions_end():
    """Told of it, played on, then closed as a restart; newcomers are busy; the process ends well."""
    command = [
        sys.executable,
        "-m",
        "tests.browser.serve_scripted",
        "--port=0",
        "--drain_seconds=1.5",
        "--chunk_seconds=0",
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    line = process.stderr.readline()
    port = int(re.search(r"http://127.0.0.1:(\d+)/", line)[1])

    async def play() -> None:
        async with websockets.connect(f"ws://127.0.0.1:{port}/ws") as socket:
            client = Client(socket)
            await client.begin()
            process.send_signal(signal.SIGTERM)
            assert (await client.until("draining"))["seconds"] == 1.5
            await client.watch(8)
            async with websockets.connect(f"ws://127.0.0.1:{port}/ws") as late:
                assert (await Client(late).hear())["message"] == "the server is about to restart"
            assert fetch(f"http://127.0.0.1:{port}/health")[0] == 503
            assert fetch(f"http://127.0.0.1:{port}/health/live")[0] == 200
            with pytest.raises(ConnectionClosed) as closed:
                await client.watch(10_000)
            assert closed.value.rcvd.code == 1012

    try:
        asyncio.run(play())
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.stderr.close()


def test_a_full_house_says_so_and_a_place_becomes_free(courtyard):
    async def play(server: Running) -> None:
        async with server.connect() as one, server.connect() as two:
            first, second = Client(one), Client(two)
            await asyncio.gather(first.begin(), second.begin(seed=2))
            await asyncio.gather(first.watch(20), second.watch(20))
            async with server.connect() as three:
                third = Client(three)
                busy = await third.hear()
                assert busy == {"type": "busy", "message": "all 2 places are taken", "retry_seconds": 5}
                with pytest.raises(ConnectionClosed) as closed:
                    await third.until("hello")
                assert closed.value.rcvd.code == 1013
        while metric(server, "sessions "):
            await asyncio.sleep(0.05)
        async with server.connect() as four:
            await Client(four).begin()
        assert (
            metric(server, "busy_total") == 1 and metric(server, 'sessions_ended_total{reason="left"}') >= 2
        )

    with Running(courtyard(max_sessions=2)) as server:
        asyncio.run(play(server))


def test_a_session_that_fails_leaves_the_others_alone(courtyard, monkeypatch):
    """One's device work raises: it is told so, the other plays on, and the place is free again."""
    step = scripted.ScriptedSession.step
    bad = lambda self, keys: 1 / 0 if self.host.seed == 13 else step(self, keys)
    monkeypatch.setattr(scripted.ScriptedSession, "step", bad)

    async def play(server: Running) -> None:
        async with server.connect() as one, server.connect() as two:
            good, unlucky = Client(one), Client(two)
            await good.begin()
            await unlucky.begin(seed=13)
            assert (await unlucky.until("bye"))["why"] == "failed"
            await good.watch(40)
        assert metric(server, 'sessions_ended_total{reason="failed"}') == 1

    with Running(courtyard()) as server:
        asyncio.run(play(server))


@pytest.mark.parametrize(
    ("fields", "why"),
    [({"idle_seconds": 0.5}, "idle"), ({"total_seconds": 0.5}, "over"), ({"stall_seconds": 0.5}, "stalled")],
)
def test_limits_end_a_session(courtyard, fields, why):
    async def play(server: Running) -> None:
        async with server.connect() as socket:
            client, got = Client(socket), 0
            await client.begin()
            while True:
                data = await asyncio.wait_for(socket.recv(), 30)
                if isinstance(data, str) and json.loads(data)["type"] == "bye":
                    assert json.loads(data)["why"] == why
                    return
                got += isinstance(data, bytes)
                with contextlib.suppress(ConnectionClosed):  # what it said last is still to be read
                    if why == "over":
                        await client.keys(0)
                    if why != "stalled":
                        await client.say("ping", t=0, shown=got)

    with Running(courtyard(**fields)) as server:
        asyncio.run(play(server))


def test_who_does_not_acknowledge_gets_no_endless_queue(courtyard):
    """Frames in flight are at most two seconds and a chunk; then the world waits, and goes on when they arrived."""

    async def play(server: Running) -> None:
        async with server.connect() as socket:
            client = Client(socket)
            await client.begin()
            got = 0
            with pytest.raises(TimeoutError):
                while True:
                    got += isinstance(await asyncio.wait_for(socket.recv(), 1.0), bytes)
            assert got <= 2 * 20 + 8
            await client.say("ping", t=0, shown=got)
            await client.watch(8)

    with Running(courtyard(fps=20.0)) as server:
        asyncio.run(play(server))


def test_who_may_come(courtyard):
    async def knock(server: Running, **options) -> str:
        try:
            async with server.connect(**options) as socket:
                return (await Client(socket).hear())["type"]
        except InvalidStatus as error:
            return str(error.response.status_code)

    async def play(server: Running) -> None:
        page = f"127.0.0.1:{server.port}"
        with_token = {"subprotocols": ["lingbot.v1", "token.s3cret"]}
        assert await knock(server) == "403"
        assert await knock(server, **with_token) == "hello"
        assert await knock(server, **with_token, origin=f"http://{page}") == "hello"
        assert await knock(server, **with_token, origin="http://127.0.0.1:1") == "403"
        assert await knock(server, **with_token, origin="http://evil.example") == "403"
        assert await knock(server, additional_headers={"Authorization": "Bearer s3cret"}) == "hello"
        assert await knock(server, additional_headers={"Authorization": "Bearer wrong"}) == "403"

    with Running(courtyard(token="s3cret")) as server:
        asyncio.run(play(server))
        assert fetch(server.url("/api/bundle"))[0] == fetch(server.url("/metrics"))[0] == 401
        status, body, _ = fetch(server.url("/api/bundle"), Authorization="Bearer s3cret")
        assert status == 200 and json.loads(body)["name"] == "The courtyard"
        assert fetch(server.url("/"), Host="evil.example")[0] == 400
        assert (
            fetch(server.url("/health"), Host="10.1.2.3")[0] == 200
        )  # a balancer calls a pod by its address


def test_pages_and_files(courtyard):
    with Running(courtyard()) as server:
        status, body, headers = fetch(server.url("/"))
        assert status == 200 and b"<title>Walk</title>" in body
        assert headers["content-security-policy"].startswith("default-src 'self'")
        status, body, headers = fetch(server.url("/web/main.js"))
        assert status == 200 and headers["content-type"].startswith("text/javascript")
        picture = fetch(server.url("/api/pictures/1"))[1]
        assert pixels(picture).shape == (72, 96, 3)
        for path in (
            "/web/..%2fapp.py",
            "/web/../app.py",
            "/web/%2e%2e/config.py",
            "/api/pictures/3",
            "/api/pictures/-1",
            "/x",
        ):
            assert fetch(server.url(path))[0] == 404, path


def test_a_world_that_cannot_be_opened_ends_the_server(tmp_path):
    game = Game.of(config(run=str(make_bundle(tmp_path))))
    (tmp_path / "tiny" / "params" / "world" / "digests" / "metadata").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"), Running(game):
        pass


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match="run = .*: neither a run .* nor a bundle"):
        Game.of(config(run=str(tmp_path)))
    bundle = make_bundle(tmp_path)
    with pytest.raises(ConfigError, match=r"size = \(10, 32\): must be multiples of 16, 16"):
        Game.of(config(run=str(bundle), size=(10, 32)))
    for fields, why in (
        ({"events": ("night",)}, "events = 'night': must be `name: text`"),
        ({"events": ("a: b", "a: c")}, "each name once"),
        ({"token": "two words"}, "token = '...': must be of letters"),
        ({"max_sessions": 0}, "max_sessions = 0"),
    ):
        with pytest.raises(ConfigError, match=why):
            config(**fields)
    (bundle / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="has no pictures to start from; give one with --picture=FILE"):
        Game.of(config(run=str(bundle)))
    Image.new("RGB", (40, 33)).save(tmp_path / "door.png")
    game = Game.of(config(run=str(bundle), picture=str(tmp_path / "door.png")))
    assert (
        game.size == (32, 32) and dataclasses.replace(game).beginnings[0].prompt == "a place to walk through"
    )
