"""Game processes that never outlive their owner.

The engine is a process of its own. It ignores SIGTERM, and when its Python parent is killed it stays alive and
leaks shared memory. Three things hold against that: `close` kills what does not leave; a guard (a shell that
waits on a pipe which only the parent holds) kills the engine the moment the parent is gone, however it went;
and `sweep`, at the next start, clears what is left of parents that no longer live.

An engine's working folder is `<engines>/<parent pid>-<its start time>`, and appears in its command line.
"""

import contextlib
import logging
import shutil
import subprocess
import time
from pathlib import Path

import psutil

_SHARED_MEMORY = Path("/dev/shm")
# EOF comes when the last holder of the pipe is gone; a line means that all is well. $1 is the working folder.
_GUARD = r"""
read line && exit 0
for file in $(grep -laF "$1/" /proc/[0-9]*/cmdline); do
    process=${file%/cmdline}
    [ "$(cat "$process/comm")" = vizdoom ] || continue
    instance=$(tr '\0' '\n' < "$file" | grep -A1 viz_instance_id | tail -n1)
    kill -9 "${process#/proc/}"
    rm -f /dev/shm/ViZDoom*"$instance"
done
rm -rf "$1"
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


def instance_id(process: psutil.Process) -> str:
    """The engine's instance id, with which the names of its shared memory end."""
    arguments = process.cmdline()
    return arguments[arguments.index("+viz_instance_id") + 1]


class Guard:
    """Watches over the engines of a working folder. Made before the engine is started, so that there is no gap:
    a process between fork and exec still holds the pipe, and after exec its command line names the folder."""

    def __init__(self, work: Path):
        self._work = work
        self._watch = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "guard", str(work)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a signal to the parent's group must not reach it
        )

    def close(self) -> None:
        """Makes sure that the engines are gone and leave nothing behind."""
        _clear(self._work)
        self._watch.communicate(b"done\n")


def _clear(work: Path) -> int:
    """Kills the engines of a folder and removes their shared memory. Returns how many there were."""
    found = _find(work)
    for engine in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            instance = instance_id(engine)
            engine.kill()
            engine.wait(10)
            for path in _SHARED_MEMORY.glob(f"ViZDoom*{instance}"):
                path.unlink(missing_ok=True)
    return len(found)


def sweep(engines: Path) -> int:
    """Kills engines whose parents are dead and removes their folders. Returns how many were killed."""
    killed = 0
    for work in sorted(engines.glob("*-*")):
        pid, _, started = work.name.partition("-")
        if not (pid.isdigit() and started.isdigit()):
            continue
        if psutil.pid_exists(int(pid)) and _started(psutil.Process(int(pid))) == int(started):
            continue
        killed += _clear(work)
        shutil.rmtree(work, ignore_errors=True)
    _remove_unused_shared_memory()
    if killed:
        logging.getLogger(__name__).warning("killed %d engine(s) left by a dead collector", killed)
    return killed


def _remove_unused_shared_memory(age: float = 5.0) -> None:
    """Removes our engines' shared memory that no process maps: when an engine dies while it starts, vizdoom takes
    its Python process down with it and nobody is left who knows the names. Spares files younger than `age` s."""
    old = [
        path
        for path in _SHARED_MEMORY.glob("ViZDoom*")
        if path.owner() == psutil.Process().username() and time.time() - path.stat().st_mtime > age
    ]
    if not old:
        return
    mapped = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            mapped |= {Path(m.path) for m in process.memory_maps() if "ViZDoom" in m.path}
    for path in set(old) - mapped:
        path.unlink(missing_ok=True)
