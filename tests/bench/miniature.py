"""Everything a published checkpoint goes through, on a folder of any size, on several processes of several devices.

    python -m tests.bench miniature --source=FOLDER --processes=2 --devices=4

FOLDER is a checkpoint in the published or the diffusers layout. It is converted to a bundle; the bundle is trained
from by several processes over data, fsdp and seq, killed, resumed and trained again by one process; converted back;
sampled and played on a mesh and on one device. What a user would type runs as a user would type it. Networks compute
in float32, so that differences are those of the order of sums. The last line of stdout is one JSON object:

    losses                       of every step
    resumed_equal                killed and resumed on the same devices every loss is bit-equal, and one process of all
                                 devices restores the same bits and takes the same records next
    one_process_max_difference   of a loss, one process of all devices against several
    converted_back_equal         every tensor of the untrained bundle, after bundle -> published -> bundle
    sampled_max_difference       of frames in [-1, 1], a mesh of all devices against one
    played_max_difference        the same of a session of one of the networks
"""

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from lingbot_jax.parallel.mesh import MeshConfig
from lingbot_jax.parallel.multihost import LOST
from tests import xla

ROOT = pathlib.Path(__file__).parents[2]
STEPS, SAVED, FRAMES, CLIPS = 4, 2, 9, 16
DIED = "This most likely indicates that another task died"  # JAX, of a process that was not in a collective


def mesh_of(devices: int) -> MeshConfig:
    """All three axes above one, where eight or more devices allow it."""
    data, seq = (2, 2) if devices % 8 == 0 else (1, 2 if devices % 2 == 0 else 1)
    return MeshConfig(data=data, fsdp=devices // data // seq, seq=seq)


def environment(devices: int, cache: pathlib.Path) -> dict[str, str]:
    return os.environ | xla.environment(cache, devices)


def run(command: list[str], devices: int, cache: pathlib.Path) -> str:
    """Runs a command to its end; its stdout."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment(devices, cache),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return done.stdout


class Job:
    """One command in several processes that find each other."""

    def __init__(self, command: list[str], processes: int, devices: int, cache: pathlib.Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        many = ["--distributed", f"--coordinator=127.0.0.1:{port}", f"--processes={processes}"]
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", *command, *([*many, f"--process={i}"] if processes > 1 else [])],
                cwd=ROOT,
                env=environment(devices, cache),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(processes)
        ]

    def alive(self) -> bool:
        return all(process.poll() is None for process in self._processes)

    def kill(self) -> None:
        """Kills the last process, and waits for the others, which end by themselves.

        Raises RuntimeError: one of them took it for the end of the run, or for a mistake of the user.
        """
        *others, last = self._processes
        last.send_signal(signal.SIGKILL)
        for process in others:
            _, errors = process.communicate()
            in_collective = process.returncode == LOST and "run the same command again" in errors
            if not (in_collective or (process.returncode == -signal.SIGABRT and DIED in errors)):
                raise RuntimeError(
                    f"a peer of the killed process ended with {process.returncode}:\n{errors[-4000:]}"
                )
        last.communicate()

    def finish(self) -> list[str]:
        """Waits for all; their outputs. Raises RuntimeError if one failed."""
        ended = [process.communicate() for process in self._processes]
        for process, (out, errors) in zip(self._processes, ended, strict=True):
            if process.returncode:
                raise RuntimeError(
                    f"a process ended with {process.returncode}:\n{out[-2000:]}{errors[-4000:]}"
                )
        return [out for out, _ in ended]


@dataclasses.dataclass(frozen=True)
class Miniature:
    """A folder to work in, and the devices of the job."""

    folder: pathlib.Path
    processes: int
    devices: int

    @property
    def cache(self) -> pathlib.Path:
        return self.folder / "compiled"

    @property
    def bundle(self) -> pathlib.Path:
        return self.folder / "bundle"

    def say(self, what: str) -> None:
        print(f"{what}...", file=sys.stderr, flush=True)

    def command(self, name: str) -> list[str]:
        """`experiments.train` of a run, by a config file in the folder."""
        path = self.folder / f"{name}.py"
        worker = "from tests.bench.miniature import train_config\n"
        arguments = f"{str(self.folder)!r}, {name!r}, {self.processes * self.devices}"
        path.write_text(f"{worker}def get_config():\n    return train_config({arguments})\n")
        return ["experiments.train", f"--config={path}"]

    def job(self, name: str) -> Job:
        return Job(self.command(name), self.processes, self.devices, self.cache)

    def losses(self, name: str) -> list[float]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        found = {line["step"]: line["loss"] for line in map(json.loads, lines)}
        if sorted(found) != list(range(1, STEPS + 1)):
            raise RuntimeError(f"run {name}: metrics of steps {sorted(found)}")
        return [found[step] for step in sorted(found)]

    def killed(self) -> None:
        """A run that is killed after a checkpoint. Raises RuntimeError: it had ended by itself."""
        job, metrics = self.job("killed"), self.folder / "killed" / "metrics.jsonl"
        while job.alive() and not (metrics.exists() and metrics.read_text().count("\n") > SAVED):
            time.sleep(0.02)
        if not job.alive():
            raise RuntimeError("the run that was to be killed ended first")
        job.kill()

    def worker(self, run: str, one: bool = False, flags: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Trains (or resumes) a run and looks at what `miniature_worker` does, in the same processes."""
        total = self.processes * self.devices
        processes, devices = (1, total) if one else (self.processes, self.devices)
        command = ["tests.bench.miniature_worker", str(self.folder), str(total), f"--train={run}", *flags]
        return [
            json.loads(out.splitlines()[-1]) for out in Job(command, processes, devices, self.cache).finish()
        ]


def measure(source: pathlib.Path, folder: pathlib.Path, processes: int, devices: int) -> dict[str, Any]:
    """Everything, in `folder`. Raises RuntimeError where a command fails."""
    from tests.bench import miniature_worker as worker

    made = Miniature(folder, processes, devices)
    total = processes * devices
    made.say("convert")
    convert = ["experiments.convert", "--dtype=keep", f"--source={source}", f"--out={made.bundle}"]
    run(convert, 1, made.cache)
    equal = worker.converted_back(made.bundle, folder)
    worker.make_data(made.bundle, folder / "data", CLIPS, FRAMES)
    made.say(f"train in {processes} x {devices}")
    made.job("whole").finish()
    made.say("kill")
    made.killed()
    made.say("resume, restore")
    many = made.worker("killed")
    made.say(f"train in 1 x {total}, restore, sample and play")
    (one,) = made.worker("alone", one=True, flags=["--sample"])
    records = dict(row for part in many for row in part["records"])
    same = all(part["state"] == one["state"] for part in many) and records == dict(one["records"])
    whole, killed, alone = (made.losses(name) for name in ("whole", "killed", "alone"))
    return {
        "losses": whole,
        "resumed_equal": whole == killed and same,
        "one_process_max_difference": max(abs(a - b) for a, b in zip(whole, alone, strict=True)),
        "converted_back_equal": equal,
        "sampled_max_difference": one["sampled"],
        "played_max_difference": one["played"],
    }


def train_config(folder: str | pathlib.Path, name: str, devices: int):
    """The config file of a run: the bundle's world in float32, trained on the made-up clips."""
    from tests.bench import miniature_worker as worker

    return worker.train_config(pathlib.Path(folder), name, mesh_of(devices), STEPS, SAVED, FRAMES)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tests.bench miniature", description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, type=pathlib.Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=4)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.source.absolute(), pathlib.Path(folder), options.processes, options.devices)
    print(json.dumps(found))
