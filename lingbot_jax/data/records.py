"""Shards of records: ArrayRecord files that appear whole or not at all, and a reader that survives damage.

A shard is `<split>-00003-of-00012.array_record`, one clip a record and one record a chunk (group_size:1), so
that any record is one read: of a local file or, by ArrayRecord's own client, of an object in gs://.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from lingbot_jax.data.schema import ClipError
from lingbot_jax.files import is_remote, reached, whole_file

SUFFIX = ".array_record"
DATASET = "dataset.json"
_NAME = re.compile(r"(?P<split>\w+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.array_record")


class DataError(ClipError):
    """A data set that cannot be read on: missing, incomplete, or with too many bad records."""


def shard_name(split: str, index: int, count: int) -> str:
    """File name of shard `index` of `count`."""
    return f"{split}-{index:05d}-of-{count:05d}{SUFFIX}"


def write_shard(path: epath.PathLike, records: Iterable[bytes], compression: str) -> None:
    """Writes all `records` to `path`, which then exists whole; if this is interrupted it does not exist.

    Args:
      compression: "uncompressed", or an ArrayRecord codec such as "zstd:3".
    """
    with open_shard(path, compression) as write:
        for record in records:
            write(record)


@contextlib.contextmanager
def open_shard(path: epath.PathLike, compression: str = "uncompressed") -> Iterator[Callable[[bytes], None]]:
    """A function that writes a record; `path` exists, whole, once the block has ended well (`write_shard`)."""
    with whole_file(path) as partial:
        writer = ArrayRecordWriter(str(partial), f"group_size:1,{compression}")
        try:
            yield writer.write
        finally:
            writer.close()


def file_sha256(path: epath.PathLike) -> str:
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_shards(folder: epath.PathLike, split: str, field: str = "config.data.path") -> list[epath.Path]:
    """The shards of a split, in order.

    Args:
      field: the flag that `folder` is from, for errors.

    Raises:
      DataError: there are none, or one is missing.
      ConfigError: the folder cannot be read.
    """
    with reached(folder, field):
        found = sorted(p for p in epath.Path(folder).glob(f"{split}-*{SUFFIX}") if _NAME.fullmatch(p.name))
    place = f"{field} = {os.fspath(folder)!r}"
    if not found:
        raise DataError(f"{place}: no shard {split}-*{SUFFIX}; collect first (python -m experiments.collect)")
    counts = {_NAME.fullmatch(p.name)["count"] for p in found}
    if len(counts) > 1:
        raise DataError(f"{place}: shards of two data sets (of-{', of-'.join(sorted(counts))})")
    count = int(counts.pop())
    present = {int(_NAME.fullmatch(p.name)["index"]) for p in found}
    missing = sorted(set(range(count)) - present)
    if missing:
        raise DataError(
            f"{place}: {shard_name(split, missing[0], count)} is missing ({len(missing)} of {count} shards);"
            " run the collector again to complete it"
        )
    return found


class ErrorBudget:
    """Counts bad records and shards against `max_bad_records`. Each is logged once, with its name.

    A fault met again (another epoch) counts once.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def report(self, where: str, problem: str) -> None:
        """Notes that `where` ("shard:index" or a shard) is faulty.

        Raises:
          DataError: more than `limit` different faults.
        """
        with self._lock:
            if where in self._seen:
                return
            self._seen.add(where)
            count = len(self._seen)
        line = f"{where}: {problem}"
        if count > self._limit:
            raise DataError(f"{line}; {count} bad records, config.data.max_bad_records = {self._limit}")
        logging.getLogger(__name__).warning("replaced %s (bad record %d of %d)", line, count, self._limit)

    def leave_one_of(self, records: int) -> None:
        """Lowers the limit so that it cannot allow all that many records to be faulty: nothing would be left."""
        self._limit = min(self._limit, len(self._seen) + records - 1)


class Readers:
    """Reads single records of any shards: one open reader a thread and shard, since readers are not safe to share."""

    def __init__(self):
        self._local = threading.local()

    def read(self, path: epath.Path, index: int) -> bytes:
        """Raises DataError: the record is damaged or not there."""
        readers = self._local.__dict__.setdefault("readers", {})
        try:
            if path not in readers:
                readers[path] = ArrayRecordReader(str(path), "readahead_buffer_size:0")
            return readers[path].read([index])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            # Riegeli reports damage in paragraphs: keep the first words.
            raise DataError(re.split(r"[;,(]", str(error), maxsplit=1)[0].strip()) from None


class Records:
    """Random access to the raw records of some shards, across all of them.

    A shard that cannot be opened (cut off, foreign, no regular file) is one fault. Its records keep their numbers
    where dataset.json knows how many they are, so that the order of the others does not depend on it. A shard that is
    meant to have none has none.

    Args:
      within: stands before the names of shards, where there are several data sets.

    Attributes:
      readable: how many records are in shards that could be opened.
    """

    def __init__(self, shards: Iterable[epath.PathLike], budget: ErrorBudget, within: str = ""):
        self.budget, self._within = budget, within
        self.readable = 0
        self.readers = Readers()
        self._index: list[tuple[epath.Path, int]] = []
        self._closed: set[epath.Path] = set()
        for path in map(epath.Path, shards):
            reader = _open(path)
            count = _promised(path) if reader is None else reader.num_records()
            if reader is None and count != 0:
                advice = "not a whole ArrayRecord file; delete it and run the collector again"
                budget.report(within + path.name, advice)
                self._closed.add(path)
            elif reader is not None:
                self.readable += count
                reader.close()
            self._index += [(path, i) for i in range(count or 0)]
        if not self.readable:
            raise DataError("no shard holds a readable record; collect the data again")
        budget.leave_one_of(self.readable)

    def __len__(self) -> int:
        return len(self._index)

    def name(self, i: int) -> str:
        """`shard:index` of record i."""
        path, index = self._index[i]
        return f"{self._within}{path.name.removesuffix(SUFFIX)}:{index}"

    def __getitem__(self, i: int) -> bytes | None:
        """The bytes of record i, or None if they are damaged and the budget is not spent.

        Raises:
          DataError: the budget is spent.
        """
        path, index = self.place(i)
        if path in self._closed:
            return None
        try:
            return self.readers.read(path, index)
        except DataError as error:
            self.budget.report(self.name(i), str(error))
            return None

    def place(self, i: int) -> tuple[epath.Path, int]:
        """The shard of record i, and which of its records it is."""
        return self._index[i]


def _open(path: epath.Path) -> ArrayRecordReader | None:
    """A reader, or None if the file is not a whole ArrayRecord file (which the library reports by `ok`)."""
    if not is_remote(path) and not Path(path).is_file():  # opening a FIFO would wait for ever
        return None
    try:
        reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
    except (RuntimeError, ValueError):
        return None
    return reader if reader.ok() and reader.num_records() > 0 else None


def _promised(path: epath.Path) -> int | None:
    """How many records a shard has by its data set's dataset.json; None if that says nothing."""
    try:
        splits: dict[str, Any] = json.loads((path.parent / DATASET).read_text())["splits"]
        count = splits[_NAME.fullmatch(path.name)["split"]]["shards"][path.name]["clips"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return count if isinstance(count, int) and 0 <= count < 2**24 else None


def record_count(path: epath.PathLike) -> int:
    """How many records a whole shard has; 0 also of one that cannot be opened."""
    reader = _open(epath.Path(path))
    if reader is None:
        return 0
    count = reader.num_records()
    reader.close()
    return count
