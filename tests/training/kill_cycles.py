"""Kills a run with -9 at random moments, again and again: its losses must be those of a run left alone.

    python -m tests.training.kill_cycles --cycles=20

The run has two experts and changes phase half-way. Kills come at random moments between the start of a process
and a few checkpoints later, so they hit reading, compiling, training, writing and the change of phase.
"""

import argparse
import os
import pathlib
import random
import tempfile
import time

from lingbot_jax.training.config import CheckpointConfig, Phase, TrainConfig
from tests import xla
from tests.training import micro


def logged(config: TrainConfig) -> int:
    path = pathlib.Path(config.run) / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill_at(config: TrainConfig, lines: int, delay: float) -> int | None:
    """Starts the run and kills it `delay` seconds after it has logged `lines` steps. None: it ended before."""
    process = micro.start(config)
    deadline = time.monotonic() + 500
    while process.poll() is None and logged(config) < lines:
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"{lines} steps were not reached: {process.communicate()[0]}")
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    output = process.communicate()[0]
    assert process.returncode in (-9, 0), output
    return logged(config) if process.returncode else None


def check(config: TrainConfig, want: dict[int, float], cycles: int, seed: int) -> list[int]:
    """Kills a run `cycles` times, lets it end, compares its losses; the steps logged at each kill.

    Every kill comes a few steps after the one before, so that the kills are spread over the run.
    """
    rng, kills = random.Random(seed), []
    for cycle in range(cycles):
        target = 1 + round(config.steps * 0.8 * cycle / cycles) + rng.randint(0, 3)
        kills.append(kill_at(config, target, rng.choice((0.0, 0.02, 0.1))))
        print(f"kill {cycle + 1}/{cycles} after {kills[-1]} logged steps", flush=True)
    process = micro.start(config)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert micro.losses_of(config) == want, "the losses are not those of the uninterrupted run"
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        micro.make_data(folder)
        os.environ |= xla.environment(folder / "compiled")
        fields = {
            "world": micro.world_config("high", "low"),
            "steps": options.steps,
            "checkpoint": CheckpointConfig(every=3, every_minutes=None),
            "curriculum": (
                Phase(end_step=options.steps // 2, frames=9, batch=8, shift=3.0),
                Phase(end_step=options.steps),
            ),
        }
        whole = micro.config(folder, "whole", **fields)
        assert micro.start(whole).wait() == 0
        kills = check(
            micro.config(folder, "killed", **fields), micro.losses_of(whole), options.cycles, options.seed
        )
    died = sum(k is not None for k in kills)
    print(f"{died} of {options.cycles} kills hit a running process; {options.steps} losses equal bit for bit")


if __name__ == "__main__":
    main()
