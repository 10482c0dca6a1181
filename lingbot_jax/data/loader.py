"""Batches of crops of clips: a function of (seed, step), for any number of processes (docs/data.md).

Row r of step s has the global index g = s * batch + r. Its epoch is g // n of the n records, and its record stands
at place g % n of a permutation that belongs to (seed, epoch); the crop of it begins where (seed, epoch, record) says.
Of a mixture, g says which data set the row is from, evenly spread by the weights, and how many rows before it are from
that one too: this number takes the place of g there. A record that cannot be read, or is too short, is replaced by one
of the same data set, drawn from (seed, step, row, try). Nothing depends on what was read before, so there is no
position to save, and every process makes the rows that it is asked for.

A batch is a dict of arrays (b crops of f frames):

    frames      uint8    [b f h w 3]        keys        uint8   [b f 8], row 0 zeros
    c2w         float64  [b f 4 4]          intrinsics  float32 [b f 4]
    narrative, static, scene: text [b]      record_ids: text [b], "shard:index:start", of a mixture "path/shard: ..."
    temporal: text [b f], what happens at each frame, empty where nothing is said

`scene` is the static caption, and what the scene has become by the end of the crop ("... It is night.").
A data set of latents (`data.latents`) has the same rows; its crops begin where they were encoded, and in place of
frames there are:

    latents, image  [b t h w c]   of the crop, and of its conditioning frames      known  int32 [b], how many these are
    text            float32 [b n l d], of the n texts that the run reads
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset

from lingbot_jax.config import ConfigError, require
from lingbot_jax.data.config import DataConfig, MixtureConfig
from lingbot_jax.data.latents import LatentRecords, Reading, read_manifest
from lingbot_jax.data.records import DataError, ErrorBudget, Records, find_shards
from lingbot_jax.data.schema import ClipError, Recording, decode

Batch = dict[str, Any]
Transform = Callable[[Batch], Batch]
_TRACK = ("keys", "c2w", "intrinsics")
_TEXTS = ("narrative", "static", "scene", "temporal", "record_ids")
_ORDER, _CROP, _REPLACEMENT = range(3)  # purposes of randomness
_ENDLESS = 2**48  # rows of a stream


class Dataset:
    """The clips of a split, by step and row; see the module docstring. Safe to share among threads.

    Args:
      reading: what is read of latents; None: the data must be clips.

    Attributes:
      mix: data set and place in it, by the index of a row; reads no record.
      latents: the manifest of every data set, if it holds latents.

    Raises:
      DataError: no complete data set in the folder, fewer clips than a batch, or (also while reading) more bad
        records than `config.max_bad_records`.
      ConfigError: latents that are not finished, or where there must be clips, or beside clips.
    """

    def __init__(self, config: DataConfig, split: str = "train", reading: Reading | None = None):
        self.config, self._reading = config, reading
        budget = ErrorBudget(config.max_bad_records)
        self._parts = [
            _open(part, i, config, split, budget, reading) for i, part in enumerate(config.parts())
        ]
        self.latents = tuple(part.manifest for part in self._parts if isinstance(part, LatentRecords))
        if self.latents and len(self.latents) < len(self._parts):
            raise ConfigError(
                "config.data.mixture: clips and latents; encode all data sets (experiments.encode), or none"
            )
        readable = sum(records.readable for records in self._parts)
        if readable < config.batch:
            raise DataError(
                f"config.data.path = {config.path!r}: {readable} readable clips for"
                f" config.data.batch = {config.batch}; collect more clips or take a smaller batch"
            )
        self.mix = _mix([part.weight for part in config.parts()])

    def __len__(self) -> int:
        """Records, of all data sets."""
        return sum(map(len, self._parts))

    def row(self, step: int, row: int) -> Batch:
        """The crop of row 0 <= `row` < config.batch of `step`: as a batch, without the axis b."""
        seed, attempt = self.config.seed, 0
        part, place = self.mix[step * self.config.batch + row]
        own, count = [part] if part else [], len(self._parts[part])
        epoch, place = divmod(place, count)
        record = self._order(part, epoch)[place]
        known = self._reading.known(step)[row] if self.latents else None
        while (made := self.crop(record, [seed, _CROP, epoch, record, *own], part, known)) is None:
            draw = np.random.default_rng([seed, _REPLACEMENT, step, row, attempt, *own])
            record, attempt = int(draw.integers(count)), attempt + 1
        return made

    def rows(self, step: int, rows: Sequence[int]) -> Batch:
        """A batch of those rows of `step`. Raises DataError, also for clips of different sizes."""
        return stack([self.row(step, row) for row in rows])

    def crop(
        self, record: int, seed: Sequence[int] | None, part: int = 0, known: int | None = None
    ) -> Batch | None:
        """A crop of a record of data set `part`, from a frame that `seed` says, or its first.

        None if the record is bad and the budget is not spent.

        Args:
          known: of latents: how many latent frames are conditioning frames.
        """
        records = self._parts[part]
        blob = records[record]
        if blob is None:
            return None
        frames, name = self.config.frames, records.name(record)
        try:
            if isinstance(records, LatentRecords):
                return self._latents(records, record, blob, int(known))
            clip = decode(blob)
            last = max(0, len(clip) - frames)
            start = 0 if seed is None else int(np.random.default_rng(seed).integers(last + 1))
            clip = clip.crop(start, frames)
        except ClipError as error:
            records.budget.report(name, str(error))
            return None
        return {"frames": clip.frames} | _told(clip) | {"record_ids": f"{name}:{start}"}

    def _latents(self, records: LatentRecords, record: int, blob: bytes, known: int) -> Batch:
        """A crop of latents, from its first frame. Raises ClipError: the record, or one that belongs to it, is bad."""
        crop, frames = records.decode(blob), self.config.frames
        t = (frames - 1) // records.manifest.stride + 1
        crop = dataclasses.replace(crop, latents=crop.latents[:t], **crop.cut(0, frames))
        told = _told(crop)
        image = records.conditioning(record, crop.latents, known)
        text = records.text(record, crop, self._reading.texts(told))
        made = {"latents": crop.latents, "image": image, "text": text, "known": np.int32(known)}
        return made | told | {"record_ids": f"{records.name(record)}:{crop.start}"}

    @functools.lru_cache(maxsize=64)  # noqa: B019 - a data set lives as long as its program
    def _order(self, part: int, epoch: int) -> grain.MapDataset[int]:
        """The permutation of an epoch: Grain's index shuffle, of which no more than the asked place is computed."""
        entropy = [self.config.seed, _ORDER, epoch, *([part] if part else [])]
        seed = np.random.SeedSequence(entropy).generate_state(1)[0]
        return grain.MapDataset.range(len(self._parts[part])).shuffle(int(seed))


def _told(clip: Recording) -> Batch:
    """What a crop has beside its pictures."""
    told = clip.captions
    texts = {"narrative": told.narrative, "static": told.static, "scene": told.scene(clip.timestamps[-1])}
    return {a: getattr(clip, a) for a in _TRACK} | texts | {"temporal": told.at(clip.timestamps)}


def _open(
    part: MixtureConfig,
    index: int,
    config: DataConfig,
    split: str,
    budget: ErrorBudget,
    reading: Reading | None,
) -> Records:
    """The records of one data set; where there are several, their names begin with its path."""
    field = f"config.data.mixture[{index - 1}].path" if index else "config.data.path"
    within = f"{part.path}/" if config.mixture else ""
    manifest = read_manifest(part.path, field)
    if manifest is None:
        return Records(find_shards(part.path, split, field), budget, within)
    own = f"holds latents; this needs clips, as those they are of, {manifest.clips}"
    require(reading is not None, field, part.path, own)
    return LatentRecords(part.path, split, manifest, budget, within, field)


def _mix(weights: Sequence[float]) -> grain.MapDataset[tuple[int, int]]:
    """Data set and place in it by index, evenly spread. Grain makes whole numbers of weights, the smallest 100, by
    cutting: here they are rounded first, so that a share is off by less than 1 %."""
    whole = [round(100 * weight / min(weights)) for weight in weights]
    rows = grain.MapDataset.range(_ENDLESS)
    return grain.MapDataset.mix([rows.map(lambda place, i=i: (i, place)) for i in range(len(whole))], whole)


def stack(crops: Sequence[Batch]) -> Batch:
    """One batch of crops.

    Raises:
      DataError: clips of different sizes.
    """
    pictures = "latents" if "latents" in crops[0] else "frames"
    sizes = {c[pictures].shape: c["record_ids"] for c in crops}
    if len(sizes) > 1:
        (one, a), (other, b), *_ = sizes.items()
        raise DataError(f"clips of different sizes: {a} has {one[1:3]}, {b} has {other[1:3]} pixels")
    texts = {name: np.array([c[name] for c in crops]) for name in _TEXTS}
    return {name: np.stack([c[name] for c in crops]) for name in crops[0] if name not in texts} | texts


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of all steps from `start`, one after another: what Grain reads at random."""

    dataset: Dataset
    rows: Sequence[int]
    start: int

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, i: int) -> Batch:
        step, r = divmod(int(i), len(self.rows))
        return self.dataset.row(self.start + step, self.rows[r])


def _close(iterators: list[grain.DatasetIterator]) -> None:
    """Stops the threads of the iterator and drops it."""
    iterators.pop().close()


class BatchStream:
    """The batches of steps `start`, start + 1, ... without end, made ahead by threads.

    Args:
      rows: of every step's batch, those of this process.
      transform: applied to every crop, in the threads that read.
    """

    def __init__(self, dataset: Dataset, rows: Sequence[int], start: int, transform: Transform | None = None):
        config = dataset.config
        reading = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=2 * len(rows))
        single = grain.MapDataset.source(_Rows(dataset, rows, start))
        if transform is not None:
            single = single.map(transform)
        batches = single.to_iter_dataset(reading).batch(len(rows), drop_remainder=True, batch_fn=stack)
        self._made = [iter(ThreadPrefetchIterDataset(batches, prefetch_buffer_size=config.prefetch))]
        # Also at exit: threads that still fill the buffer while the interpreter goes down abort it.
        self.close = weakref.finalize(self, _close, self._made)

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Batch:
        try:
            return next(self._made[0])
        except ConfigError as error:  # Grain adds lines about its traceback to the message
            raise type(error)(str(error).partition("\n")[0]) from None
