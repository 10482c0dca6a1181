"""Batches of clip windows from shards, with Grain: shuffled, shared among processes, resumable (docs/data.md).

A training stream never ends. Its order is a function of (seed, epoch): every epoch is a shuffle of all records,
of which process p of n takes every n-th; which window of a record is taken is a function of (seed, epoch,
record). The state is a position in that stream, so it is small and restoring it repeats the stream exactly.

A batch is a dict of arrays (b clips of f frames):

    frames      uint8    [b f h w 3]        keys        uint8   [b f 8], row 0 zeros
    c2w         float64  [b f 4 4]          intrinsics  float32 [b f 4]
    narrative, static: text [b]             record_ids: text [b], "shard:index:start"
"""

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset

from lingbot_jax.config import require
from lingbot_jax.data.records import Damage, DataError, Records, find_shards
from lingbot_jax.data.schema import Clip, ClipError, decode

Batch = dict[str, Any]
Transform = Callable[[Batch], Batch]
_ARRAYS = ("frames", "keys", "c2w", "intrinsics")
_TEXTS = ("narrative", "static", "record_ids")


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """How to read a data set.

    Attributes:
      path: its folder. frames: of a window, 4n+1. batch: clips of one process.
      seed: of the order and the windows.
      skip_limit: damaged records and shards that are skipped before the run stops.
      threads: that read and decode records; 0 reads when asked. prefetch: batches made ahead.
      processes: that make batches in place of threads; worth it only with cores to spare.
    """

    path: str
    frames: int = 33
    batch: int = 16
    seed: int = 0
    skip_limit: int = 16
    threads: int = 1
    prefetch: int = 4
    processes: int = 0

    def __post_init__(self):
        require(
            self.frames > 0 and self.frames % 4 == 1, "data.frames", self.frames, "must be 4n+1, as 33 or 81"
        )
        require(self.batch > 0, "data.batch", self.batch, "must be positive")
        for name in ("seed", "skip_limit", "threads", "processes"):
            require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "must not be negative")
        require(self.prefetch > 0, "data.prefetch", self.prefetch, "must be positive")


@dataclasses.dataclass(frozen=True)
class _Window:
    """Decodes one record and cuts the window of its epoch; None if the record is damaged."""

    records: Records
    config: LoaderConfig
    per_epoch: int
    random: bool

    def __call__(self, position: int, record: int) -> Batch | None:
        blob = self.records[record]
        if blob is None:
            return None
        name = self.records.name(record)
        try:
            clip = decode(blob)
            start = self._start(position // self.per_epoch, record, clip) if self.random else 0
            clip = clip.window(start, self.config.frames)
        except ClipError as error:
            self.records.damage.report(name, str(error))
            return None
        arrays = {a: getattr(clip, a) for a in _ARRAYS}
        texts = {"narrative": clip.captions.narrative, "static": clip.captions.static}
        return arrays | texts | {"record_ids": f"{name}:{start}"}

    def _start(self, epoch: int, record: int, clip: Clip) -> int:
        last = len(clip) - self.config.frames
        return (
            int(np.random.default_rng([self.config.seed, epoch, record]).integers(last + 1))
            if last > 0
            else 0
        )


def _stack(windows: list[Batch]) -> Batch:
    """One batch of windows.

    Raises:
      DataError: clips of different sizes.
    """
    sizes = {w["frames"].shape: w["record_ids"] for w in windows}
    if len(sizes) > 1:
        (one, a), (other, b), *_ = sizes.items()
        raise DataError(f"clips of different sizes: {a} has {one[1:3]}, {b} has {other[1:3]} pixels")
    batch = {name: np.stack([w[name] for w in windows]) for name in _ARRAYS}
    return batch | {name: np.array([w[name] for w in windows]) for name in _TEXTS}


def _close(iterators: list[grain.DatasetIterator]) -> None:
    """Stops the threads or processes of the iterator and drops it."""
    iterators.pop().close()


class TrainLoader:
    """An endless stream of batches; see the module docstring.

    Args:
      process: (index, count) of this process among those that share the data.
      transform: applied to every batch, in the thread that makes it ready (for instance to latents).

    Raises:
      DataError: no complete data set in the folder, or too much damage (also while reading).
    """

    def __init__(
        self,
        config: LoaderConfig,
        process: tuple[int, int] = (0, 1),
        transform: Transform | None = None,
        split: str = "train",
    ):
        records = Records(find_shards(config.path, split), Damage(config.skip_limit))
        index, count = process
        require(index in range(count), "process", process, "must be (index, count), index below count")
        if len(records) < config.batch * count:
            raise DataError(
                f"data {config.path}: {len(records)} clips for {count} processes x data.batch = {config.batch};"
                " collect more clips or take a smaller batch"
            )
        self._identity = {
            "records": len(records),
            "split": split,
            "sharing": count,  # not the index: one process's position is every process's
            **{k: getattr(config, k) for k in ("frames", "batch", "seed", "processes")},
        }
        order = grain.MapDataset.range(len(records)).shuffle(config.seed)[index::count]
        windows = order.repeat().map_with_index(_Window(records, config, len(order), random=True))
        reading = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=2 * config.batch)
        batches = windows.to_iter_dataset(reading).batch(config.batch, drop_remainder=True, batch_fn=_stack)
        if config.processes:
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(config.processes, config.prefetch))
        if transform is not None:
            batches = batches.map(transform)
        if not config.processes:
            batches = ThreadPrefetchIterDataset(batches, prefetch_buffer_size=config.prefetch)
        self._iterators = [iter(batches)]
        # Also at exit: threads that still fill the buffer while the interpreter goes down abort it.
        self.close = weakref.finalize(self, _close, self._iterators)

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        return next(self._iterators[0])

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch taken, as JSON values."""
        return {"of": self._identity, "at": self._iterators[0].get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on behind the batch that was the last one taken when `state` was got.

        Raises:
          DataError: the state belongs to other data or other settings.
        """
        for name, value in self._identity.items():
            theirs = state["of"].get(name)
            if theirs != value:
                raise DataError(
                    f"data.{name} = {value!r}: the checkpoint was made with {theirs!r}; use that value"
                )
        self._iterators[0].set_state(state["at"])


def evaluation_batches(
    config: LoaderConfig, split: str = "held_out", clips: int | None = None
) -> Iterator[Batch]:
    """Every clip once, in order, from its first frame; the last batch may be smaller.

    Args:
      clips: only that many, the first ones.
    """
    records = Records(find_shards(config.path, split), Damage(config.skip_limit))
    window, waiting = _Window(records, config, len(records), random=False), []
    for k in range(min(len(records), clips or len(records))):
        made = window(k, k)
        if made is not None:
            waiting.append(made)
        if len(waiting) == config.batch:
            yield _stack(waiting)
            waiting = []
    if waiting:
        yield _stack(waiting)
