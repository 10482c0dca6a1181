"""A server in a process of its own, and pages of a real browser that look at it."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from playwright.sync_api import Page

ROOT = pathlib.Path(__file__).parents[2]
SHOTS = ROOT / "runs" / "browser"  # screenshots, to be looked at
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Without a GPU, and as root in a container; nothing is throttled because no one looks.
FLAGS = [
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-background-timer-throttling",
    "--disable-renderer-backgrounding",
    "--disable-backgrounding-occluded-windows",
    "--autoplay-policy=no-user-gesture-required",
]
PATIENCE = 60.0  # seconds for what takes a tenth of one on a quiet machine

Pixels = np.ndarray


class Server:
    """`python -m MODULE FLAGS`; can be killed and started again at the same address."""

    def __init__(self, module: str, *flags: str, port: int = 0):
        self._command = [sys.executable, "-m", module, *flags]
        self.name, self.port = module.rpartition(".")[2], port
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [*self._command, f"--port={self.port}"],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={"JAX_PLATFORMS": "cpu", **os.environ},
        )
        while (
            found := re.search(r"http://127.0.0.1:(\d+)/", line := self.process.stderr.readline())
        ) is None:
            if not line and self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}")
        self.port = int(found[1])

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"


def scripted(*flags: str) -> Server:
    return Server("tests.browser.serve_scripted", "--max_sessions=3", *flags)


def until(true: Callable[[], Any], what: str) -> Any:
    """Waits for something that a page does. (A page with our security policy evaluates no strings, so that
    Playwright's own waiting for functions cannot be used.)"""
    end = time.monotonic() + PATIENCE
    while not (value := true()):
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.05)
    return value


def open_page(page: Page, server: Server) -> list[str]:
    """Opens the page and waits for frames; returns the list that its errors will be in."""
    errors: list[str] = []
    page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.goto(server.url)
    watch(page, 4)
    return errors


def frames(page: Page) -> int:
    """Frames that the page has shown."""
    return page.evaluate("globalThis.walk ? walk.frames : 0")


def watch(page: Page, count: int) -> None:
    """Waits until the page has shown so many more frames."""
    wanted = frames(page) + count
    until(lambda: frames(page) >= wanted, f"{count} frames")


def shown(page: Page) -> dict[str, Any]:
    """The header of the frame that is shown."""
    return page.evaluate("walk.shown")


def look(page: Page, width: int = 192) -> Pixels:
    """What is on the canvas, [h w 3]."""
    flat = page.evaluate(
        """(width) => {
            const view = document.getElementById("view"), small = document.createElement("canvas");
            small.width = width;
            small.height = Math.round(width * view.height / view.width);
            const context = small.getContext("2d");
            context.drawImage(view, 0, 0, small.width, small.height);
            return JSON.stringify([small.height, ...context.getImageData(0, 0, width, small.height).data]);
        }""",
        width,
    )
    height, *values = json.loads(flat)
    return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]


def flow(before: Pixels, after: Pixels) -> tuple[float, float]:
    """How far the picture moved, right and down, in the median over its pixels that moved."""
    gray = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (before, after)]
    moved = cv2.calcOpticalFlowFarneback(*gray, None, 0.5, 4, 25, 4, 7, 1.5, 0)
    strong = np.abs(moved).max(-1) > 0.3
    return tuple(float(np.median(moved[..., i][strong])) if strong.any() else 0.0 for i in (0, 1))


def flow_under(page: Page, key: str, pairs: int = 4) -> tuple[float, float]:
    """The median flow from frame to frame while a key is held, from the start of the world."""
    page.keyboard.press("r")
    until(lambda: shown(page)["number"] < 12 and shown(page)["keys"] == 0, "the world to begin again")
    page.keyboard.down(key)
    bit = 1 << "WASDIJKL".index(key.upper())
    until(lambda: shown(page)["keys"] & bit, f"a frame made with {key}")
    flows = []
    for _ in range(pairs):
        before, at = look(page), shown(page)["number"]
        watch(page, 2)
        if 0 < shown(page)["number"] - at < 8:
            flows.append(flow(before, look(page)))
    page.keyboard.up(key)
    return tuple(np.median(np.array(flows or [(0.0, 0.0)]), axis=0))


def picture(page: Page, name: str) -> None:
    """Keeps a screenshot."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png")
