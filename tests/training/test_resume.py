"""A run that is killed, preempted or damaged goes on as if nothing had happened."""

import pathlib
import random
import signal
import time

import pytest

from tests.training import micro

STEPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    micro.make_data(folder)
    done = micro.train(folder, "whole", steps=STEPS)
    assert done.returncode == 0, done.stderr
    return folder


def wait_for_step(folder: pathlib.Path, run: str, step: int, process) -> None:
    """Returns when the run has logged `step`."""
    path = folder / run / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[0]}")


def test_killed_run_repeats_the_uninterrupted_losses_bit_for_bit(folder):
    process = micro.train(folder, "killed", wait=False, steps=STEPS)
    wait_for_step(folder, "killed", random.Random().randint(5, STEPS - 4), process)
    process.kill()
    process.wait()
    done = micro.train(folder, "killed", steps=STEPS)
    assert done.returncode == 0, done.stderr
    assert micro.losses(folder, "killed") == micro.losses(folder, "whole")


def test_sigterm_saves_and_exits_cleanly(folder):
    process = micro.train(folder, "preempted", wait=False, steps=100000)
    wait_for_step(folder, "preempted", 6, process)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(30) == 0
    assert time.monotonic() - began < 30
    saved = max(int(p.name) for p in (folder / "preempted" / "checkpoints").iterdir() if p.name.isdigit())
    assert saved == max(micro.losses(folder, "preempted"))


def test_action_stage_trains_adapters_only(folder):
    done = micro.train(folder, "action", stage="action", steps=4, init=folder / "whole")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"model.heads": 5}, "model.heads = 5: must divide model.dim = 32"),
        ({"model.dim": 34}, "model.heads = 2: head_dim = dim / heads = 17 must be even for rotary pairs"),
        ({"data.frames": 12}, "data.frames = 12: must be 4n+1"),
        ({"tasks.max_given": 4}, "tasks.max_given = 4: must leave something to predict of 4 latent frames"),
        ({"nonsense": 1}, "config.nonsense=1: unknown field"),
        ({"steps": "many"}, "invalid literal for int() with base 10: 'many'"),
        ({"flow.shift": -1.0}, "flow.shift = -1.0: must be positive"),
        ({"seed": 7}, "seed: "),
    ],
)
def test_bad_configs_end_with_one_line(folder, fields, line):
    before = sorted(p.name for p in folder.iterdir())
    done = micro.train(folder, "whole" if "seed" in fields else "bad", **{"steps": STEPS} | fields)
    assert done.returncode == 2
    errors = done.stderr.strip().splitlines()
    assert errors[-1].startswith("error: ")
    assert line in errors[-1]
    assert not any("Traceback" in e for e in errors)
    assert sorted(p.name for p in folder.iterdir()) == before, "nothing is written for a bad config"
