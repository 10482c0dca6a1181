"""A job of two real processes (jax.distributed, gloo): same losses as one, shared checkpoints, a lost peer."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.parallel import multihost
from lingbot_jax.training.config import CheckpointConfig, Phase
from tests import xla
from tests.training import micro

pytestmark = pytest.mark.long

STEPS = 12
# First each process has samples of its own, then both share the tokens of the same ones.
PHASES = (
    Phase(end_step=6, frames=9, mesh=micro.mesh(1, 2, 1)),
    Phase(end_step=100000, mesh=micro.mesh(1, 1, 2)),
)


def start(folder, run: str, steps: int = STEPS, **fields) -> list[subprocess.Popen]:
    """Both processes of a training run whose mesh changes half-way."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_fields = {"steps": steps, "curriculum": PHASES, "checkpoint": CheckpointConfig(every=3)}
    command = micro.command(micro.config(folder, run, **run_fields | fields))
    command += ["--distributed", f"--coordinator=127.0.0.1:{port}", "--processes=2"]
    return [
        subprocess.Popen(
            [*command, f"--process={i}"],
            cwd=micro.ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla.flags()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def wait_for_step(run, step: int, processes: list[subprocess.Popen]) -> None:
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 500
    while not metrics.exists() or metrics.read_text().count("\n") < step:
        assert time.monotonic() < deadline and processes[0].poll() is None, processes[0].communicate()[1]
        time.sleep(0.05)


def alone(*arguments, devices: int = 1) -> str:
    """Runs a program of `one_process`."""
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla.flags(devices)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.one_process", *map(str, arguments)],
        cwd=micro.ROOT,
        env=os.environ | flags,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


class Harmed(NamedTuple):
    """How the processes of one run ended, start by start, after what was done to the second."""

    folder: pathlib.Path
    hangs: list[tuple[int, str, str]]  # exit code, stdout and stderr of each
    preempted: list[tuple[int, str, str]]


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    outputs = [process.communicate(timeout=600) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


@pytest.fixture(scope="module")
def harmed(tmp_path_factory):
    """A run `harmed` whose second process stops answering, then is preempted, and which then comes to its end.

    One that is killed, and that the losses are those of a run left alone bit for bit: `tests.test_miniature`.
    """
    folder = tmp_path_factory.mktemp("two")
    micro.make_data(folder)
    processes = start(folder, "harmed")
    wait_for_step(folder / "harmed", 1, processes)
    processes[1].send_signal(signal.SIGSTOP)
    hangs = ended(processes[:1])  # by itself
    processes[1].kill()
    processes[1].communicate()

    processes = start(folder, "harmed")
    wait_for_step(folder / "harmed", 5, processes)
    processes[1].send_signal(signal.SIGTERM)
    preempted = ended(processes)

    for code, _, errors in ended(start(folder, "harmed")):
        assert code == 0, errors[-3000:]
    return Harmed(folder, hangs, preempted)


def test_a_process_that_hangs_ends_the_other(harmed):
    """With JAX's message, and no dump of threads after it."""
    ((code, _, errors),) = harmed.hangs
    assert code == -signal.SIGABRT, errors[-3000:]
    assert "This most likely indicates that another task died" in errors, errors[:3000]
    assert "most recent call first" not in errors


def test_preemption_of_one_process_stops_both_at_the_same_step(harmed):
    assert [code for code, *_ in harmed.preempted] == [multihost.PREEMPTED] * 2, harmed.preempted
    stopped = {
        line for _, out, _ in harmed.preempted for line in out.splitlines() if "stopped by a signal" in line
    }
    assert len(stopped) == 1, stopped


def test_losses_equal_one_process(harmed):
    alone("alone", harmed.folder, "harmed")
    two, one = micro.losses(harmed.folder, "harmed"), micro.losses(harmed.folder, "harmed-alone")
    assert sorted(two) == list(range(1, STEPS + 1))
    # Sums in another order drift apart slowly; the first steps show that data, noise and updates are the same.
    np.testing.assert_allclose([two[s] for s in range(1, 7)], [one[s] for s in range(1, 7)], rtol=1e-5)
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-3)


def test_checkpoint_is_restored_on_one_and_on_four_devices(harmed):
    assert "restored" in alone("restore", harmed.folder, "harmed", devices=4)


def test_wrong_numbers_are_refused():
    with pytest.raises(ConfigError, match="give all three"):
        multihost.initialize("127.0.0.1:1", 2, None)
    with pytest.raises(ConfigError, match=r"process = 2: must be in 0..1"):
        multihost.initialize("127.0.0.1:1", 2, 2)


def test_a_mistake_of_the_user_is_one_line_and_code_2_everywhere(harmed):
    """N5: it never looks like a lost host, on which schedulers start again for ever."""
    processes = start(harmed.folder, "mistaken", codec=str(harmed.folder / "nowhere"))
    for code, _, errors in ended(processes):
        assert code == 2, errors[-3000:]
        last = errors.strip().splitlines()[-1]
        assert last.startswith("error: --config.codec = ") and "neither a run" in last, errors[-3000:]
    assert not (harmed.folder / "mistaken").exists()
