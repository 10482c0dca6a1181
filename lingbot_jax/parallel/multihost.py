"""Several processes as one job: start, who loads which part of a batch, stopping together, losing one.

JAX starts and watches the processes (`jax.distributed`): a coordinator in process 0 hears a heartbeat of each.
What is added here are the things a training job must agree on, and a clean end when a process is gone:

    a process is killed  -> its peers fail in the next collective (gloo: at once), which `guard` turns into one line
                            and exit code 75
    a process hangs      -> JAX misses its heartbeat after `HEARTBEAT` seconds, says so and aborts its peers (SIGABRT,
                            in a shell 134): no Python code gets a say
    SIGTERM (preemption) -> all processes stop after the same step (`Stop`), whichever got the signal
    afterwards           -> the same command resumes from the newest checkpoint; a scheduler may loop on 75 and 134
"""

import contextlib
import faulthandler
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
from lingbot_jax.parallel.mesh import BATCH_AXES, SEQ
from lingbot_jax.parallel.sharding import batch_sharding, check_divides

T = TypeVar("T")

HEARTBEAT = 30  # seconds without a sign of life after which a process counts as lost
MESSAGE = 2048  # bytes of an error that are told to other processes
LOST = 75  # exit code EX_TEMPFAIL: run the same command again


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


def data_parts(mesh: Mesh) -> list[set[int]]:
    """The processes that load each part of a batch, in the order of the parts.

    Processes whose devices differ in `seq` alone work on the same samples and load the same part.

    Raises:
      ConfigError: the processes do not divide the batch axes evenly.
    """
    grid = mesh.devices.reshape(-1, mesh.shape[SEQ])  # [row of the batch, seq]
    rows: dict[int, set[int]] = {}
    for row, devices in enumerate(grid):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(row)
    groups = sorted({tuple(sorted(r)) for r in rows.values()})
    even = len({len(g) for g in groups}) == 1 and sum(len(g) for g in groups) == len(grid)
    require(
        even,
        "mesh",
        tuple(mesh.shape.values()),
        f"data x fsdp = {len(grid)} rows of a batch do not divide evenly over {len(rows)} processes",
    )
    return [{process for process, r in rows.items() if tuple(sorted(r)) == group} for group in groups]


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which part of every batch this process loads, and how many parts there are."""
    parts = data_parts(mesh)
    return next(i for i, part in enumerate(parts) if jax.process_index() in part), len(parts)


def take_shard(values: T, mesh: Mesh) -> T:
    """This process's rows of arrays that every process made for the whole batch (random draws)."""
    index, count = data_shard(mesh)

    def rows(x):
        check_divides("batch", len(x), BATCH_AXES, mesh)
        size = len(x) // count
        return x[index * size : (index + 1) * size]

    return jax.tree.map(rows, values)


def global_batch(mesh: Mesh, local: T) -> T:
    """A batch over all processes from the rows that each has loaded (`data_shard`).

    Raises:
      ConfigError: the rows do not divide over data x fsdp.
    """
    if mesh.size == 1:
        return local
    sharding = batch_sharding(mesh)
    _, count = data_shard(mesh)

    def place(x):
        check_divides("batch", len(x) * count, BATCH_AXES, mesh)
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(place, local)


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
