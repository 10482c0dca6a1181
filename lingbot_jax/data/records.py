"""Shards of records: ArrayRecord files that appear whole or not at all, and a reader that survives damage.

A shard is `<split>-00003-of-00012.array_record`, one clip a record and one record a chunk (group_size:1), so
that any record is one read. It is written under a temporary name and renamed when it is whole.
"""

import hashlib
import logging
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from lingbot_jax.data.schema import ClipError

SUFFIX = ".array_record"
_NAME = re.compile(r"(?P<split>\w+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.array_record")


class DataError(ClipError):
    """A data set that cannot be read on: missing, incomplete, or with too much damage."""


def shard_name(split: str, index: int, count: int) -> str:
    """File name of shard `index` of `count`."""
    return f"{split}-{index:05d}-of-{count:05d}{SUFFIX}"


def write_shard(path: Path, records: Iterable[bytes], compression: str) -> None:
    """Writes all `records` to `path`, which then exists whole; if this is interrupted it does not exist.

    Args:
      compression: "uncompressed", or an ArrayRecord codec such as "zstd:3".
    """
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    writer = ArrayRecordWriter(str(part), f"group_size:1,{compression}")
    try:
        for record in records:
            writer.write(record)
        writer.close()
    except BaseException:
        if writer.is_open():
            writer.close()
        part.unlink(missing_ok=True)
        raise
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_shards(folder: str | Path, split: str) -> list[Path]:
    """The shards of a split, in order.

    Raises:
      DataError: there are none, or one is missing.
    """
    found = sorted(p for p in Path(folder).glob(f"{split}-*{SUFFIX}") if _NAME.fullmatch(p.name))
    if not found:
        raise DataError(
            f"data {folder}: no shard {split}-*{SUFFIX}; collect first (python -m experiments.collect)"
        )
    counts = {_NAME.fullmatch(p.name)["count"] for p in found}
    if len(counts) > 1:
        raise DataError(f"data {folder}: shards of two data sets (of-{', of-'.join(sorted(counts))})")
    count = int(counts.pop())
    present = {int(_NAME.fullmatch(p.name)["index"]) for p in found}
    missing = sorted(set(range(count)) - present)
    if missing:
        raise DataError(
            f"data {folder}: {shard_name(split, missing[0], count)} is missing ({len(missing)} of {count} shards);"
            " run the collector again to complete it"
        )
    return found


class Damage:
    """Counts faulty records and shards against a limit. Each is logged once, with its name.

    A fault met again (another epoch, a resumed run) counts once.
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
            raise DataError(f"{line}; {count} faults, the limit (skip_limit) is {self._limit}")
        logging.getLogger(__name__).warning("skipped %s (fault %d of %d)", line, count, self._limit)

    def leave_one_of(self, records: int) -> None:
        """Lowers the limit so that it cannot allow all that many records to be faulty: nothing would be left."""
        self._limit = min(self._limit, len(self._seen) + records - 1)

    # The lock cannot travel to a worker process.
    def __getstate__(self):
        return {"_limit": self._limit, "_seen": self._seen}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._lock = threading.Lock()


class Records:
    """Random access to the raw records of some shards, across all of them.

    A shard that cannot be opened (cut off, foreign, empty) is one fault and contributes no records.
    """

    def __init__(self, shards: Iterable[Path], damage: Damage):
        self.damage = damage
        self._local = threading.local()
        self._index: list[tuple[Path, int]] = []
        for path in shards:
            reader = _open(path)
            if reader is None:
                damage.report(
                    path.name, "not a whole ArrayRecord file; delete it and run the collector again"
                )
                continue
            self._index += [(path, i) for i in range(reader.num_records())]
            reader.close()
        if not self._index:
            raise DataError("no shard holds a readable record; collect the data again")
        damage.leave_one_of(len(self._index))

    def __len__(self) -> int:
        return len(self._index)

    def name(self, i: int) -> str:
        """`shard:index` of record i."""
        path, index = self._index[i]
        return f"{path.name.removesuffix(SUFFIX)}:{index}"

    def __getitem__(self, i: int) -> bytes | None:
        """The bytes of record i, or None if they are damaged and the limit is not reached.

        Raises:
          DataError: the limit of faults is passed.
        """
        path, index = self._index[i]
        try:
            return self._reader(path).read([index])[0]
        except (
            RuntimeError,
            IndexError,
        ) as error:  # riegeli reports damage in paragraphs: keep the first words
            self.damage.report(self.name(i), re.split(r"[;,(]", str(error), maxsplit=1)[0].strip())
            return None

    def _reader(self, path: Path) -> ArrayRecordReader:
        """One open reader a thread and shard: readers are not safe to share."""
        readers = self._local.__dict__.setdefault("readers", {})
        if path not in readers:
            readers[path] = ArrayRecordReader(str(path), "readahead_buffer_size:0")
        return readers[path]

    def __getstate__(self):
        return {"damage": self.damage, "_index": self._index}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._local = threading.local()


def _open(path: Path) -> ArrayRecordReader | None:
    """A reader, or None if the file is not a whole ArrayRecord file (which the library reports by `ok`)."""
    try:
        reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
    except (RuntimeError, ValueError):
        return None
    return reader if reader.ok() and reader.num_records() > 0 else None
