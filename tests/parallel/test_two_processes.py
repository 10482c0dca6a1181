"""A job of two real processes (jax.distributed, gloo): same losses as one, shared checkpoints, a lost peer."""

import os
import signal
import socket
import subprocess
import sys
import time

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


def finish(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, and a finished run `whole` of two processes."""
    folder = tmp_path_factory.mktemp("two")
    micro.make_data(folder)
    finish(start(folder, "whole"))
    return folder


def test_losses_equal_one_process(folder):
    alone("alone", folder, "whole")
    two, one = micro.losses(folder, "whole"), micro.losses(folder, "whole-alone")
    assert sorted(two) == list(range(1, STEPS + 1))
    # Sums in another order drift apart slowly; the first steps show that data, noise and updates are the same.
    np.testing.assert_allclose([two[s] for s in range(1, 7)], [one[s] for s in range(1, 7)], rtol=1e-5)
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-3)


def test_checkpoint_is_restored_on_one_and_on_four_devices(folder):
    assert "restored" in alone("restore", folder, "whole", devices=4)


def test_a_killed_process_ends_the_other_and_the_run_resumes(folder):
    processes = start(folder, "killed")
    wait_for_step(folder / "killed", 5, processes)
    processes[1].send_signal(signal.SIGKILL)
    _, errors = processes[0].communicate(timeout=600)  # it ends by itself
    if processes[0].returncode == -signal.SIGABRT:  # it was not in a collective
        assert_aborted(errors)
    else:
        assert processes[0].returncode == multihost.LOST, errors[-3000:]
        assert "error: process 0 of 2: another process was lost" in errors
        assert "run the same command again" in errors
    processes[1].communicate()

    finish(start(folder, "killed"))
    assert micro.losses(folder, "killed") == micro.losses(folder, "whole")


def test_a_process_that_hangs_ends_the_other(folder):
    processes = start(folder, "hangs")
    wait_for_step(folder / "hangs", 1, processes)
    processes[1].send_signal(signal.SIGSTOP)
    _, errors = processes[0].communicate(timeout=600)
    assert processes[0].returncode == -signal.SIGABRT, errors[-3000:]
    assert_aborted(errors)
    processes[1].kill()
    processes[1].communicate()


def assert_aborted(errors: str) -> None:
    """JAX's message, and no dump of threads after it."""
    assert "This most likely indicates that another task died" in errors, errors[:3000]
    assert "most recent call first" not in errors


def test_preemption_of_one_process_stops_both_at_the_same_step(folder):
    processes = start(folder, "preempted", steps=100000)
    wait_for_step(folder / "preempted", 5, processes)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [multihost.PREEMPTED] * 2
    stopped = {line for output in outputs for line in output.splitlines() if "stopped by a signal" in line}
    assert len(stopped) == 1, stopped


def test_wrong_numbers_are_refused():
    with pytest.raises(ConfigError, match="give all three"):
        multihost.initialize("127.0.0.1:1", 2, None)
    with pytest.raises(ConfigError, match=r"process = 2: must be in 0..1"):
        multihost.initialize("127.0.0.1:1", 2, 2)


def test_a_mistake_of_the_user_is_one_line_and_code_2_everywhere(folder):
    """N5: it never looks like a lost host, on which schedulers start again for ever."""
    processes = start(folder, "mistaken", codec=str(folder / "nowhere"))
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 2, errors[-3000:]
        last = errors.strip().splitlines()[-1]
        assert last.startswith("error: --config.codec = ") and "neither a run" in last, errors[-3000:]
    assert not (folder / "mistaken").exists()
