"""A wait without an end ends the process with its stacks and a code of its own; a step and its clips are such waits."""

import os
import socket
import subprocess
import sys
import threading

import pytest

from lingbot_jax.data.loader import BatchStream
from lingbot_jax.parallel import multihost
from lingbot_jax.training import watchdog
from lingbot_jax.training.config import WatchdogConfig
from lingbot_jax.training.report import Report
from tests.training import micro

HANG = """
import threading
from lingbot_jax.training.watchdog import bounded

def planted_in_the_loader():
    threading.Event().wait()

threading.Thread(target=planted_in_the_loader, daemon=True).start()

def planted_in_the_loop():
    threading.Event().wait()

with bounded("what comes in time", 600.0):
    pass
with bounded("the clips of step 7", 0.1):
    planted_in_the_loop()
"""


def test_a_hang_ends_the_process_with_its_stacks():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", HANG],
        cwd=micro.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == multihost.STALLED == 124, done.stderr
    first, *stacks = done.stderr.splitlines()
    who = f"process 0 of 1 on {socket.gethostname()}"
    assert first == f"error: {who}: waited 0.1 s for the clips of step 7; its threads:"
    assert {"planted_in_the_loader", "planted_in_the_loop"} <= {line.split(" in ")[-1] for line in stacks}


@pytest.mark.parametrize(
    ("place", "method", "wait"),
    [(BatchStream, "__next__", "the clips of step 1"), (Report, "later", "step 1")],
)
def test_the_loop_bounds_its_waits(folder, monkeypatch, place, method, wait):
    """Something blocks until the watchdog comes for it."""
    bounds = WatchdogConfig(step_seconds=0.01, data_seconds=0.01)
    config = micro.config(folder, f"stuck {method}", steps=1, curriculum=(), watchdog=bounds)
    came, blocked, real = threading.Event(), [], getattr(place, method)

    def end(what, seconds):
        if blocked and what == wait:
            came.set()

    def block(*arguments):
        blocked.append(True)
        assert came.wait(60), "the watchdog did not come"
        return real(*arguments)

    monkeypatch.setattr(watchdog, "end", end)
    monkeypatch.setattr(place, method, block)
    micro.train(config)
    assert blocked == [True]
