"""Collects a data set: shards are handed to processes, each of which owns one engine (docs/data.md).

A shard is a pure function of the config, so it does not matter who makes it, when, or for the how many-th time.
Shards appear whole or not at all, and those that are there are not made again: that is all there is to
resuming. A process that dies is replaced and its shard begun again; processes whose collector is gone leave at
their next clip, because the pipe to it is closed.
"""

import collections
import contextlib
import dataclasses
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lingbot_jax.cards import README
from lingbot_jax.config import ConfigError, flat, require
from lingbot_jax.data.records import (
    DATASET,
    SUFFIX,
    DataError,
    ErrorBudget,
    Records,
    file_sha256,
    shard_name,
    write_shard,
)
from lingbot_jax.data.schema import SCHEMA_VERSION, decode, encode
from lingbot_jax.engine.collect import engines
from lingbot_jax.engine.collect.card import data_card
from lingbot_jax.engine.collect.config import CollectConfig
from lingbot_jax.engine.collect.source import EngineLost, Shard, Source, plan
from lingbot_jax.files import reached, write_whole

TRIES = 3  # of a shard, when its engine or its process dies
STARTED, ENGINES = "collect.json", ".engines"
MakeSource = Callable[[CollectConfig, Path, Shard], Source]


class CollectError(DataError):
    """The collection cannot go on. One line."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What one call did: `frames` were made by `processes` in `seconds`; `clips` were there before or are now."""

    clips: int
    made: int
    frames: int
    seconds: float
    processes: int

    def __str__(self) -> str:
        if not self.made:
            return f"{self.clips} clips were there already"
        rate = self.frames / self.seconds
        return (
            f"{self.clips} clips, {self.made} of them made now: {self.frames} frames in {self.seconds:.1f} s, "
            f"{rate:.0f} frames/s with {self.processes} processes, {rate / self.processes:.0f} each"
        )


def configured_source(config: CollectConfig, work: Path, shard: Shard) -> Source:
    """The source that the config names; only its engine is imported."""
    if config.source == "rendered":
        from lingbot_jax.engine.collect.rendered_source import RenderedSource

        return RenderedSource(config)
    from lingbot_jax.engine.collect.vizdoom_source import VizdoomSource

    return VizdoomSource(config, work, [task.map for task in shard.tasks])


def collect(
    config: CollectConfig, make_source: MakeSource = configured_source, command: str | None = None
) -> Summary:
    """Makes the shards that are missing in `config.out`, then writes dataset.json and a card beside them.

    Args:
      make_source: a module-level function; it is called in the worker processes, once a shard.
      command: that the config is from, for the card.

    Raises:
      ConfigError: the folder cannot be written to, or holds clips of another config.
      CollectError: a shard failed again and again, or another collector is at work in the folder.
    """
    out = Path(config.out).resolve()
    with _alone(out):
        _same_config(out, config)
        engines.sweep(out / ENGINES)
        shards = plan(config)
        todo = [s for s in shards if not _path(out, s).exists()]
        processes = min(config.processes or os.cpu_count() or 1, max(1, len(todo)))
        begin = time.monotonic()
        if todo:
            (out / DATASET).unlink(missing_ok=True)
            _make(config, make_source, todo, processes)
        seconds = time.monotonic() - begin
        if not (out / DATASET).exists():
            described = _describe(out, config, shards)
            write_whole(out / README, data_card(described, out.name, command))
            write_whole(out / DATASET, json.dumps(described, indent=2) + "\n")
        engines.sweep(out / ENGINES)
        shutil.rmtree(out / ENGINES, ignore_errors=True)
    made = sum(len(s.tasks) for s in todo)
    return Summary(sum(len(s.tasks) for s in shards), made, made * config.frames, seconds, processes)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Makes the folder and holds its lock, which the system releases however this process ends."""
    with contextlib.ExitStack() as stack:
        with reached(out, "config.out"):
            out.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(out / ".lock", "w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CollectError(f"config.out = {str(out)!r}: another collector is at work there") from None
        yield


def _path(out: Path, shard: Shard) -> Path:
    return out / shard_name(shard.split, shard.index, shard.count)


def _identity(config: CollectConfig) -> dict[str, Any]:
    """The fields that decide the bytes, as JSON reads them back."""
    values = dataclasses.asdict(config)
    del values["out"], values["processes"]
    return json.loads(json.dumps({"schema_version": SCHEMA_VERSION, **values}))


def _same_config(out: Path, config: CollectConfig) -> None:
    """Refuses a folder with shards of another config; marks a new one."""
    path, mine = out / STARTED, _identity(config)
    if not any(out.glob(f"*{SUFFIX}")):
        write_whole(path, json.dumps(mine, indent=2) + "\n")
        return
    try:
        theirs = json.loads(path.read_text())
    except (OSError, ValueError):
        raise CollectError(f"{path}: missing or damaged, so its shards may be of another config") from None
    made = dict(flat(theirs))
    for name, value in flat(mine):
        advice = (
            f"the clips in {out} were made with {made.get(name)!r}; choose another config.out or delete it"
        )
        require(made.get(name) == value, f"config.{name}", value, advice)


def _describe(out: Path, config: CollectConfig, shards: list[Shard]) -> dict[str, Any]:
    """dataset.json: config, hashes, and what is in the clips, which are read for it: a source may differ from plan."""
    splits: dict[str, Any] = {}
    for shard in shards:
        split = splits.setdefault(shard.split, {"clips": 0, "frames": 0, "shards": {}})
        path = _path(out, shard)
        records = Records([path], ErrorBudget(0))
        for i in range(len(records)):
            clip = decode(records[i])
            split["frames"] += len(clip)
            for name in ("source", "behaviour", "map"):
                split.setdefault(f"{name}s", collections.Counter())[getattr(clip, name)] += 1
        split["clips"] += len(records)
        split["shards"][path.name] = {"clips": len(records), "sha256": file_sha256(path)}
    return {"config": _identity(config), "splits": splits}


# --- the collector's side ---------------------------------------------------------------------------------------


class _Worker:
    """One process and the shard it is at."""

    def __init__(self, config: CollectConfig, make_source: MakeSource):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, config, make_source), daemon=True)
        self.process.start()
        theirs.close()
        self.shard: Shard | None = None
        self.clips = 0

    def begin(self, shard: Shard) -> None:
        self.shard, self.clips = shard, 0
        self.pipe.send(shard)

    def stop(self) -> None:
        """The closed pipe tells the process to leave; it does so at its next clip."""
        self.pipe.close()
        self.process.join(30)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _make(config: CollectConfig, make_source: MakeSource, todo: list[Shard], processes: int) -> None:
    """Makes the shards with that many processes and shows how far it is."""
    waiting, tries = list(reversed(todo)), dict.fromkeys(todo, 0)
    workers: list[_Worker] = []
    columns = (TextColumn("collect"), BarColumn(), MofNCompleteColumn(), TextColumn("clips"))
    with Progress(
        *columns,
        TextColumn("{task.fields[rate]:.0f} frames/s"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as progress:
        bar = progress.add_task("clips", total=sum(len(s.tasks) for s in todo), rate=0.0)
        begin = time.monotonic()

        def show(clips: int) -> None:
            progress.advance(bar, clips)
            rate = progress.tasks[0].completed * config.frames / (time.monotonic() - begin)
            progress.update(bar, rate=rate)

        try:
            while waiting or workers:
                while waiting and len(workers) < processes:
                    workers.append(_Worker(config, make_source))
                    workers[-1].begin(waiting.pop())
                ready = wait([w.pipe for w in workers])
                for worker in [w for w in workers if w.pipe in ready]:
                    _listen(worker, workers, waiting, tries, show)
        finally:
            for worker in workers:
                worker.stop()


def _listen(worker: _Worker, workers: list[_Worker], waiting: list[Shard], tries: dict, show) -> None:
    """Handles one message of a worker: a clip, a finished shard, a failure, or its death."""
    try:
        kind, text = worker.pipe.recv()
    except (EOFError, ConnectionError):
        kind, text = "lost", "its process died"
    if kind == "clip":
        worker.clips += 1
        show(1)
        return
    if kind == "lost":
        shard = worker.shard
        tries[shard] += 1
        name = shard_name(shard.split, shard.index, shard.count)
        if tries[shard] == TRIES:
            raise CollectError(f"shard {name}: failed {TRIES} times, lastly because {text}")
        show(-worker.clips)
        waiting.append(shard)
    elif kind == "error":
        raise CollectError(text)
    if kind == "done" and waiting:
        worker.begin(waiting.pop())
        return
    workers.remove(worker)
    worker.stop()


# --- the worker's side ------------------------------------------------------------------------------------------


def _work(pipe: Connection, config: CollectConfig, make_source: MakeSource) -> None:
    """A process: makes the shards it is sent until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the collector's to handle
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `finally` closes the engine
    out = Path(config.out).resolve()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            shard = pipe.recv()
            try:
                make_shard(config, make_source, shard, out, lambda: pipe.send(("clip", "")))
            except EngineLost as error:
                pipe.send(("lost", f"its engine was lost: {error}"))
                return
            except (ValueError, RuntimeError, OSError) as error:
                if isinstance(error, ConnectionError):
                    raise
                kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
                pipe.send(("error", kind + " ".join(str(error).split())))
                return
            pipe.send(("done", ""))


def make_shard(
    config: CollectConfig, make_source: MakeSource, shard: Shard, out: Path, made: Callable[[], None]
) -> None:
    """Writes one shard into `out`; calls `made` after every clip."""
    source = make_source(config, engines.folder(out / ENGINES), shard)

    def records() -> Iterator[bytes]:
        for task in shard.tasks:
            yield encode(source.record(task))
            made()

    try:
        write_shard(_path(out, shard), records(), config.compression)
    finally:
        source.close()
