"""A crowd of clients against a server in a process of its own: `make bench ARGS="load --minutes=60 --clients=20"`.

Prints every minute, and as its last line one JSON object. Only addresses of this machine are called.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil

from tests.serve import abuse


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("load", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--clients", type=int, default=20, help="at a time; half of them behave")
    parser.add_argument("--sessions", type=int, default=6, help="places that the server has")
    parser.add_argument("--fuzz", type=int, default=0, help="messages of nonsense, sent first")
    parser.add_argument("--run", default=None, help="a bundle to serve; default: a scripted world")
    chosen = parser.parse_args(arguments)
    module = "experiments.serve" if chosen.run else "tests.browser.serve_scripted"
    own = [f"--run={chosen.run}"] if chosen.run else ["--chunk_seconds=0.02"]
    flags = ["--port=0", f"--max_sessions={chosen.sessions}", "--stall_seconds=3", "--drain_seconds=3", *own]
    server = subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        stderr=subprocess.PIPE,
        text=True,
        env={"JAX_PLATFORMS": "cpu", **os.environ},
    )
    try:
        while (found := re.search(r"http://127.0.0.1:(\d+)/", server.stderr.readline())) is None:
            if server.poll() is not None:
                sys.exit("load: the server did not start")
        print(json.dumps(asyncio.run(_measure(server, f"ws://127.0.0.1:{found[1]}/ws", chosen))))
    finally:
        server.kill()
        server.stderr.close()


async def _measure(server: subprocess.Popen, url: str, chosen: argparse.Namespace) -> dict[str, object]:
    process = psutil.Process(server.pid)
    mebibytes = lambda: round(process.memory_info().rss / 2**20, 1)
    await abuse.crowd(url, chosen.clients, 20.0, seed=99)  # allocators and caches have settled
    before, counts, frames, wronged = mebibytes(), abuse.collections.Counter(), 0, []
    if chosen.fuzz:
        tally = await abuse.fuzz(url, chosen.fuzz, at_once=chosen.sessions)
        counts += tally.counts
        print(f"fuzzed: {dict(tally.counts)}, {mebibytes()} MiB", flush=True)
    end, minute = time.monotonic() + 60 * chosen.minutes, 0
    while time.monotonic() < end:
        minute += 1
        tally = await abuse.crowd(url, chosen.clients, min(60.0, end - time.monotonic()), seed=minute)
        counts += tally.counts
        frames += tally.frames
        wronged += tally.wronged
        print(
            f"minute {minute}: {dict(tally.counts)}, {mebibytes()} MiB, wronged {len(tally.wronged)}",
            flush=True,
        )
    after = mebibytes()
    server.send_signal(signal.SIGTERM)
    return {
        **{name.replace(" ", "_"): n for name, n in counts.items()},
        "frames": frames,
        "wronged": len(wronged),
        "wronged_first": wronged[:3],
        "mebibytes_before": before,
        "mebibytes_after": after,
        "exit_code": await asyncio.to_thread(server.wait, 60),
    }
