"""How play feels, in a browser on this machine: `make bench ARGS=play`, on a quiet one.

From a clean clone to the first frame on the page (`make play` there, with an environment, and a cache of compiled
programs, of its own); then frames per second while walking, and how long after a press of a key the first frame that
was made with it is shown: from the event's own time stamp to the animation frame, over presses at random moments. The
last line is one JSON object.

    --here          start the server from this checkout, with what is installed: quick
    --run=BUNDLE    another world than the shipped one (implies --here)
    --flags=...     more flags of experiments.serve
"""

import argparse
import json
import os
import pathlib
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
WALKED = 20.0  # seconds over which frames are counted


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("play", description=__doc__.splitlines()[0])
    parser.add_argument("--here", action="store_true")
    parser.add_argument("--run", default=None)
    parser.add_argument("--flags", default="", type=shlex.split)
    parser.add_argument("--presses", type=int, default=60)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if chosen.here or chosen.run:
            run = chosen.run or "assets/world"
            command, where = [sys.executable, "-m", "experiments.serve", f"--run={run}"], ROOT
        else:
            where = pathlib.Path(folder) / "clone"
            subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, where], check=True)
            command = ["make", "--no-print-directory", "play"]
        print(json.dumps(measure(command, where, chosen, pathlib.Path(folder))))


def measure(
    command: list[str], where: pathlib.Path, chosen: argparse.Namespace, folder: pathlib.Path
) -> dict[str, float]:
    """Runs the server and plays."""
    flags = ["--port=0", *chosen.flags]
    command = [*command, *flags] if command[0] != "make" else [*command, f"ARGS={shlex.join(flags)}"]
    own = {"XDG_CACHE_HOME": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VIRTUAL_ENV")
    }
    began = time.monotonic()
    server = subprocess.Popen(
        command, cwd=where, stderr=subprocess.PIPE, text=True, env=inherited | own, start_new_session=True
    )
    try:
        while (found := re.search(r"http://127.0.0.1:\d+/\S*", line := server.stderr.readline())) is None:
            print(line.rstrip(), file=sys.stderr)
            if not line and server.poll() is not None:
                sys.exit("play: the server did not start")
        return play(found[0], began, chosen.presses)
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # the group that this function made
        server.wait()
        server.stderr.close()


def play(url: str, began: float, presses: int) -> dict[str, float]:
    """Opens the page, walks and presses."""
    from playwright.sync_api import sync_playwright

    from tests.browser.pages import CHROMIUM, FLAGS, frames, shown, until

    rng = random.Random(0)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.goto(url)
        until(lambda: frames(page) >= 1, "the first frame")
        seconds_to_page = time.monotonic() - began
        page.keyboard.down("w")
        until(lambda: shown(page)["keys"] == 1, "a frame made with W")
        first, at = frames(page), time.monotonic()
        time.sleep(WALKED)
        rate = (frames(page) - first) / (time.monotonic() - at)
        page.keyboard.up("w")
        time.sleep(1.0)
        page.evaluate("walk.latency.measured.length = 0")
        for _ in range(presses):
            key = rng.choice("wasdjl")
            page.keyboard.down(key)
            time.sleep(0.25 + 0.5 * rng.random())
            page.keyboard.up(key)
            time.sleep(0.4 + 0.5 * rng.random())
        time.sleep(0.6)
        waits = sorted(page.evaluate("walk.latency.measured"))
        buffer = page.evaluate("walk.player.buffer")
        browser.close()
    assert len(waits) >= presses - 2, f"{len(waits)} of {presses} presses were answered"
    return {
        "frames_per_second": round(rate, 2),
        "key_to_frame_ms": round(statistics.median(waits), 1),
        "key_to_frame_ms_p95": round(waits[int(0.95 * (len(waits) - 1))], 1),
        "seconds_to_page": round(seconds_to_page, 1),
        "presses": len(waits),
        "buffer_ms": round(buffer, 1),
    }
