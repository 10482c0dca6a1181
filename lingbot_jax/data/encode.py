"""Makes a latent data set (`data.latents`) of one of clips: a shard of latents for every shard of clips.

A shard is a pure function of its shard of clips and of the manifest, so it does not matter who makes it, or when.
Shards appear whole or not at all, and those that are there are not made again: that is all there is to resuming.
Codec and text encoder are handed in as a value.
"""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8

from lingbot_jax.config import ConfigError, require
from lingbot_jax.data.crops import resize_crops
from lingbot_jax.data.latents import (
    GREY,
    LATENTS,
    MANIFEST,
    Cache,
    LatentCrop,
    LatentsManifest,
    manifest_json,
    pack,
    stored,
    texts_of,
)
from lingbot_jax.data.records import (
    DATASET,
    ErrorBudget,
    Records,
    find_shards,
    open_shard,
    record_count,
)
from lingbot_jax.data.schema import Clip, ClipError, decode, encode
from lingbot_jax.files import reached, read_json, write_whole

SPLIT = "train"  # held-out clips are measured in pixels
ADVICE = "choose another config.out, or delete it"


class Encoder(Protocol):
    """A codec and a text encoder, as `worlds.encode.ClipEncoder`.

    Attributes:
      batch: crops at a time. text_dtype: that texts are stored in.
    """

    batch: int
    text_dtype: str

    def latents(self, frames: UInt8[np.ndarray, "b f H W 3"]) -> list[Any]:
        """`b n h w c`, part after part in time; they may still be computed."""
        ...

    def tails(self, frames: UInt8[np.ndarray, "b f H W 3"], conditioning: int, length: int) -> Any:
        """`b k m h w c`: the grey latents behind k = 1 .. `conditioning` known ones; may still be computed."""
        ...

    def grey(self, height: int, width: int) -> Any:
        """`h w c`."""
        ...

    def texts(self, texts: list[str]) -> list[Float[np.ndarray, "n d"]]: ...


@dataclasses.dataclass
class Summary:
    """What one call did: `crops` of `clips` clips, of which `short` were shorter than a crop; shards before it."""

    shards: int = 0
    there: int = 0
    clips: int = 0
    crops: int = 0
    short: int = 0
    finished: bool = False

    def __str__(self) -> str:
        made = (
            f"{self.shards} shards encoded, {self.there} were there: {self.crops} crops of {self.clips} clips"
        )
        short = f", {self.short} of them too short" if self.short else ""
        return made + short + ("" if self.finished else "; other processes have shards to make")


def encode_clips(
    out: str,
    manifest: LatentsManifest,
    encoder: Encoder,
    budget: ErrorBudget,
    text_bytes: int,
    part: tuple[int, int] = (0, 1),
    start: Callable[[int], None] = lambda clips: None,
    advance: Callable[[], None] = lambda: None,
) -> Summary:
    """Makes the shards that are missing in `out` of those that are this process's, and dataset.json when all are there.

    Args:
      manifest: of the latents; `clips` is where the clips are.
      text_bytes: of encoded texts kept, so that each is encoded once.
      part: process and number of processes; each makes every n-th shard.
      start: told of how many clips are to be encoded. advance: told of each.

    Raises:
      ConfigError: the folder cannot be written to, or holds other latents; clips of another size.
      DataError: no clips, or too many bad records.
    """
    folder, work = _open_folder(out, manifest), _Encoding(manifest, encoder, Cache(text_bytes), advance)
    shards = find_shards(manifest.clips, SPLIT)
    mine = shards[part[0] :: part[1]]
    todo = [path for path in mine if not (folder / path.name).exists()]
    if todo:
        (folder / DATASET).unlink(missing_ok=True)
    summary = work.summary
    summary.there = len(mine) - len(todo)
    start(sum(map(record_count, todo)))
    with reached(out, "config.out"):
        if not (folder / GREY).exists():
            grey = stored(np.asarray(encoder.grey(*manifest.size)), manifest.dtype)
            write_whole(folder / GREY, pack("grey", grey))
        for path in todo:
            _encode_shard(folder, path, budget, work)
            summary.shards += 1
        summary.finished = all((folder / path.name).exists() for path in shards)
        if summary.finished and not (folder / DATASET).exists():
            write_whole(folder / DATASET, json.dumps(_describe(folder, shards), indent=2) + "\n")
    return summary


def first_size(clips: str, budget: ErrorBudget) -> tuple[int, int]:
    """Height and width of the first clip that can be read. Raises DataError."""
    records = Records(find_shards(clips, SPLIT), budget)
    read = (_clip(records, i) for i in range(len(records)))
    return next(clip for clip in read if clip is not None).frames.shape[1:3]


def _open_folder(out: str, manifest: LatentsManifest) -> epath.Path:
    """The folder, with the manifest in it. Raises ConfigError: it holds latents of another one."""
    folder, mine = epath.Path(out), manifest_json(manifest)
    with reached(out, "config.out"):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MANIFEST).exists():
            other = any(folder.glob("*.array_record"))
            require(not other, "config.out", out, f"holds shards, but no {MANIFEST}; {ADVICE}")
            write_whole(folder / MANIFEST, json.dumps(mine, indent=2) + "\n")
    theirs = read_json(folder / MANIFEST, "config.out")
    for name, value in mine.items():
        was = theirs.get(name)
        if was != value:
            raise ConfigError(
                f"config.out = {out!r}: its latents have {name} = {was!r:.80}, these would have {value!r:.80}; {ADVICE}"
            )
    return folder


def _describe(folder: epath.Path, shards: list[epath.Path]) -> dict[str, Any]:
    """dataset.json: how many crops are in each shard."""
    counts = {path.name: {"clips": record_count(folder / path.name)} for path in shards}
    return {"splits": {SPLIT: {"clips": sum(c["clips"] for c in counts.values()), "shards": counts}}}


@dataclasses.dataclass
class _Encoding:
    """What all shards of a call share."""

    manifest: LatentsManifest
    encoder: Encoder
    cache: Cache
    advance: Callable[[], None]
    summary: Summary = dataclasses.field(default_factory=Summary)

    def crops(self, records: Records) -> Iterator[tuple[Clip, int]]:
        """Every crop of every clip, of the manifest's size, with its first frame."""
        manifest, frames = self.manifest, self.manifest.frames
        for i in range(len(records)):
            clip = _clip(records, i)
            if clip is not None:
                self.summary.clips += 1
                starts = range(0, len(clip) - frames + 1, manifest.grid)
                self.summary.short += not starts
                self.summary.crops += len(starts)
                yield from ((_resized(clip.crop(start, frames), manifest.size), start) for start in starts)
            self.advance()

    def texts(self, texts: list[str]) -> list[Float[np.ndarray, "n d"]]:
        """As stored; each is encoded once, as long as the cache holds it."""
        found = {text: self.cache.get(text) for text in texts}
        new = [text for text, tokens in found.items() if tokens is None]
        for text, tokens in zip(new, self.encoder.texts(new), strict=True):
            found[text] = stored(tokens, self.encoder.text_dtype)
            self.cache.put(text, found[text], found[text].nbytes)
        return [found[text] for text in texts]


def _encode_shard(folder: epath.Path, clips: epath.Path, budget: ErrorBudget, work: _Encoding) -> None:
    """Writes the shard of one of clips, and those beside it; its own appears last."""
    own, name, numbers = work.manifest, clips.name, {}
    records = Records([clips], budget)
    beside = lambda kind: folder / name.replace(f"{SPLIT}-", f"{SPLIT}_{kind}-", 1)
    with contextlib.ExitStack() as stack:
        write = stack.enter_context(open_shard(folder / name))
        write_text = stack.enter_context(open_shard(beside("text")))
        write_known = stack.enter_context(open_shard(beside("known"))) if own.tail else None
        for crops, latents, tails in _encoded(work, records):
            told = [texts_of(crop.captions, own.captions, own.temporal) for crop, _ in crops]
            new = list(dict.fromkeys(text for texts in told for text in texts if text not in numbers))
            for text, tokens in zip(new, work.texts(new), strict=True):
                numbers[text] = len(numbers)
                write_text(pack("text", tokens))
            for (crop, start), texts, array in zip(crops, told, latents, strict=True):
                values = {
                    f.name: getattr(crop, f.name) for f in dataclasses.fields(crop) if f.name != "frames"
                }
                found = LatentCrop(
                    **values, latents=array, start=start, texts=tuple(numbers[t] for t in texts)
                )
                write(encode(found, LATENTS))
            for tail in itertools.chain.from_iterable(tails):
                write_known(pack("latents", tail))


def _encoded(
    work: _Encoding, records: Records
) -> Iterator[tuple[list[tuple[Clip, int]], np.ndarray, Iterable[np.ndarray]]]:
    """Batches of crops with their latents and tails; a batch is computed while the one before it is written."""
    own, encoder = work.manifest, work.encoder
    dispatched = None
    finish = lambda crops, parts, tails: (
        crops,
        stored(np.concatenate([np.asarray(part) for part in parts], axis=1)[: len(crops)], own.dtype),
        () if tails is None else stored(np.asarray(tails)[: len(crops)], own.dtype),
    )
    made = work.crops(records)
    while crops := list(itertools.islice(made, encoder.batch)):
        rows = [crop.frames for crop, _ in crops]
        frames = np.stack(rows + rows[:1] * (encoder.batch - len(rows)))  # one program for the last batch too
        tails = encoder.tails(frames, own.conditioning, own.tail) if own.tail else None
        before, dispatched = dispatched, (crops, encoder.latents(frames), tails)
        if before is not None:
            yield finish(*before)
    if dispatched is not None:
        yield finish(*dispatched)


def _clip(records: Records, i: int) -> Clip | None:
    """A clip; None if it is bad and the budget is not spent."""
    blob = records[i]
    try:
        return None if blob is None else decode(blob)
    except ClipError as error:
        records.budget.report(records.name(i), str(error))
        return None


def _resized(clip: Clip, size: tuple[int, int]) -> Clip:
    made = resize_crops({"frames": clip.frames, "intrinsics": clip.intrinsics}, size)
    return dataclasses.replace(clip, **made)
