"""Game processes that never outlive their owner.

The engine is a process of its own. It ignores SIGTERM, and when its Python parent is killed it stays alive and
leaks shared memory. Three things hold against that: `close` kills what does not leave; a guard (a shell that
waits on a pipe which only the parent holds) kills the engine the moment the parent is gone, however it went;
and `sweep`, at the next start, clears what is left of parents that no longer live.

An engine's working folder is `<engines>/<parent pid>-<its start time>`, and appears in its command line.
"""

import logging
import shutil
import signal
import subprocess
from pathlib import Path

import psutil

_SHARED_MEMORY = Path("/dev/shm")
_GUARD = """
read line && exit 0
[ "$(cat /proc/$1/comm)" = vizdoom ] && kill -9 $1
rm -rf "$3"
rm -f /dev/shm/ViZDoom*"$2"
"""


def folder(engines: Path) -> Path:
    """Makes and returns the working folder of engines of this process."""
    me = psutil.Process()
    path = engines / f"{me.pid}-{_started(me)}"
    path.mkdir(parents=True, exist_ok=True)
    return path


def _started(process: psutil.Process) -> int:
    """Start time in hundredths of a second, which with the pid names a process for good."""
    return round(process.create_time() * 100)


def _find(work: Path) -> list[psutil.Process]:
    """Engines whose command line names the folder."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        arguments = process.info["cmdline"] or ()
        if process.info["name"] == "vizdoom" and any(a.startswith(f"{work}/") for a in arguments):
            found.append(process)
    return found


def _instance(process: psutil.Process) -> str:
    """The engine's instance id, with which the names of its shared memory end."""
    arguments = process.cmdline()
    return arguments[arguments.index("+viz_instance_id") + 1]


class Guard:
    """Watches over the one engine that was just started in `work`."""

    def __init__(self, work: Path):
        children = [p for p in psutil.Process().children() if p.name() == "vizdoom"]
        mine = [p for p in children if any(a.startswith(f"{work}/") for a in p.cmdline())]
        self._engine = max(mine, key=lambda p: p.create_time())
        self._instance = _instance(self._engine)
        self._watch = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "guard", str(self._engine.pid), self._instance, str(work)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a signal to the parent's group must not reach it
        )

    @property
    def pid(self) -> int:
        return self._engine.pid

    def close(self) -> None:
        """Makes sure the engine is gone and leaves nothing behind."""
        _kill(self._engine)
        _remove_shared_memory(self._instance)
        self._watch.communicate(b"done\n")


def _kill(process: psutil.Process) -> None:
    if process.is_running():
        process.send_signal(signal.SIGKILL)
        process.wait(10)


def _remove_shared_memory(instance: str) -> None:
    for path in _SHARED_MEMORY.glob(f"ViZDoom*{instance}"):
        path.unlink(missing_ok=True)


def sweep(engines: Path) -> int:
    """Kills engines whose parents are dead and removes their folders. Returns how many were killed."""
    killed = 0
    for work in sorted(engines.glob("*-*")):
        pid, _, started = work.name.partition("-")
        if not (pid.isdigit() and started.isdigit()):
            continue
        if psutil.pid_exists(int(pid)) and _started(psutil.Process(int(pid))) == int(started):
            continue
        for engine in _find(work):
            instance = _instance(engine)
            _kill(engine)
            _remove_shared_memory(instance)
            killed += 1
        shutil.rmtree(work, ignore_errors=True)
    if killed:
        logging.getLogger(__name__).warning("killed %d engine(s) left by a dead collector", killed)
    return killed
