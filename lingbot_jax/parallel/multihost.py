"""Several processes as one job: start, who loads which part of a batch, stopping together, losing one.

JAX starts and watches the processes (`jax.distributed`): a coordinator in process 0 hears a heartbeat of each.
What is added here are the things a training job must agree on, and a clean end when a process is gone:

    a mistake of the user -> found by any process at the start, it ends all with the same line (`agree_on_errors`)
    a process is killed  -> its peers fail in the next collective (gloo: at once), which `guard` turns into one line
                            and exit code 75
    a process hangs      -> JAX misses its heartbeat after `HEARTBEAT` seconds, says so and aborts its peers (SIGABRT,
                            in a shell 134): no Python code gets a say
    SIGTERM (preemption) -> all processes stop after the same step (`Stop`), whichever got the signal, save it, and
                            exit with 143, as a process does (in a shell) that SIGTERM itself has ended: nobody takes
                            it for the end of the run, which is 0
    a wait passes its bound -> the process shows its stacks and exits with 124 (`training.watchdog`); its peers lose it
    afterwards           -> the same command resumes from the newest checkpoint; a scheduler may loop on 75, 124, 134
                            and 143, and must not on 2
"""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lingbot_jax.config import ConfigError, require
from lingbot_jax.parallel.mesh import BATCH_AXES
from lingbot_jax.parallel.sharding import batch_sharding, check_divides

T = TypeVar("T")

HEARTBEAT = 30  # seconds without a sign of life after which a process counts as lost
MESSAGE = 2048  # bytes of an error that are told to other processes
LOST = 75  # exit code EX_TEMPFAIL: run the same command again
STALLED = 124  # exit code, as of timeout(1): a wait passed its bound (`training.watchdog`); run it again
PREEMPTED = 128 + signal.SIGTERM  # exit code 143: stopped by SIGTERM, and saved


def initialize(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins the job. On a TPU pod or under SLURM nothing need be given; elsewhere all three.

    Args:
      coordinator: host:port of process 0. processes: how many. process: which one this is.

    Raises:
      ConfigError: only some are given, or numbers that do not fit each other.
    """
    given = [x is not None for x in (coordinator, processes, process)]
    require(
        all(given) or not any(given),
        "coordinator, processes, process",
        (coordinator, processes, process),
        "give all three, or none where the cluster is detected",
    )
    if processes is not None:
        require(processes > 0, "processes", processes, "must be positive")
        require(0 <= process < processes, "process", process, f"must be in 0..{processes - 1}")
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT, initialization_timeout=300
    )


def rows_of_process(mesh: Mesh, batch: int, process: int | None = None) -> range:
    """The rows of a batch of `batch` that a process (None: this one) loads: all between the first and the last that
    its devices hold. Processes whose devices differ in `seq` alone load the same rows.

    Raises:
      ConfigError: the rows do not divide over data x fsdp, or the process has no device in the mesh.
    """
    process = jax.process_index() if process is None else process
    check_divides("config.data.batch", batch, BATCH_AXES, mesh)
    places = batch_sharding(mesh).devices_indices_map((batch,))
    found = [i[0].indices(batch) for device, i in places.items() if device.process_index == process]
    require(bool(found), "config.mesh", tuple(mesh.shape.values()), f"has no device of process {process}")
    return range(min(start for start, _, _ in found), max(stop for _, stop, _ in found))


def global_array(mesh: Mesh, rows: T, batch: int) -> T:
    """Arrays of `batch` rows over all processes from the NumPy rows (`rows_of_process`) that each has loaded."""
    sharding, first = batch_sharding(mesh), rows_of_process(mesh, batch).start

    def place(x: np.ndarray) -> jax.Array:
        def part(index):
            start, stop, _ = index[0].indices(batch)
            return x[start - first : stop - first]

        return jax.make_array_from_callback((batch, *x.shape[1:]), sharding, part)

    return jax.tree.map(place, rows)


def place_rows(mesh: Mesh, rows: T) -> T:
    """As `global_array`, of rows that every process has all of. Raises ConfigError."""
    batch = len(jax.tree.leaves(rows)[0])
    own = rows_of_process(mesh, batch)
    return global_array(mesh, jax.tree.map(lambda x: np.asarray(x)[own.start : own.stop], rows), batch)


def to_host(array: jax.Array) -> np.ndarray:
    """The whole array in every process, however it is sharded. A collective."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def from_first(value: T) -> T:
    """What process 0 has, in all of them: anything that JSON can say. A collective."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    mine = np.zeros(size, np.uint8)
    mine[: min(size, len(text))] = text[:size]
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(mine)))


@contextlib.contextmanager
def agree_on_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of any process become errors of all, before a collective could wait for the one that failed.

    Every process runs the same block, without collectives in it, and then hears how it ended for the others: the
    first error, by process, is raised in all of them, of its own type if that is one of `kinds` (ConfigError always
    is), else as RuntimeError. Blocks may be nested: an exchange is the same at every level, and an error that has
    been exchanged is not exchanged again.
    """
    kinds = (*kinds, ConfigError, RuntimeError)
    mine = None
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or getattr(error, "agreed", False) or _lost(error):
            raise
        mine = error
    if jax.process_count() == 1:
        return
    record = np.zeros(1 + MESSAGE, np.uint8)  # which kind, 0 for no error; then the message
    if mine is not None:
        kind = next((i for i, k in enumerate(kinds) if isinstance(mine, k)), len(kinds) - 1)
        text = str(mine) if isinstance(mine, kinds) else f"{type(mine).__name__}: {mine}"
        said = np.frombuffer(text.encode()[:MESSAGE], np.uint8)
        record[0], record[1 : 1 + len(said)] = kind + 1, said
    for index, (kind, *said) in enumerate(multihost_utils.process_allgather(record)):
        if kind:
            text = bytes(said).rstrip(b"\0").decode(errors="ignore")
            agreed = mine if index == jax.process_index() else kinds[kind - 1](text)
            agreed.agreed = True
            raise agreed


class Preempted(Exception):
    """A run that SIGTERM stopped before its end, and that was saved; the message is one line for the user."""


class Stop:
    """Whether to save and stop after this step; the same answer in every process.

    With one process SIGTERM sets it. With several, JAX's preemption service hears of the signal in any of
    them and names a step that all reach.
    """

    def __init__(self):
        self._event = threading.Event()

    def __call__(self, step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._event.is_set()

    def set(self, *_) -> None:
        self._event.set()


@contextlib.contextmanager
def preemption() -> Iterator[Stop]:
    """A `Stop` that SIGTERM sets; the old handler comes back at the end."""
    stop = Stop()
    if jax.process_count() > 1:  # jax.distributed has its own handler
        yield stop
        return
    old = signal.signal(signal.SIGTERM, stop.set)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, old)


def _lost(error: Exception) -> bool:
    """Whether an error of the runtime means that another process is gone."""
    text = str(error).lower()
    signs = ("gloo", "connection reset", "connection closed", "heartbeat", "unavailable", "socket closed")
    signs += ("deadline_exceeded",)  # of an answer that the coordinator should have had
    return isinstance(error, jax.errors.JaxRuntimeError) and any(sign in text for sign in signs)


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """Ends this process with one line and exit code 75 when another one of the job is lost.

    The exit is immediate: an orderly one would wait for the lost process, in vain.
    """
    if jax.process_count() > 1:
        faulthandler.disable()  # its dump of every thread would bury what JAX says before it aborts
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or not _lost(error):
            raise
        reason = " ".join(str(error).split())[:200]
        print(
            f"error: process {jax.process_index()} of {jax.process_count()}: another process was lost "
            f"({reason}); run the same command again to resume from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LOST)
