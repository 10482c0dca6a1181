"""Latent data sets: crops of clips that a codec has encoded ahead of training (docs/data.md).

A folder like that of clips, which latents.json tells apart from one:

    latents.json                          what the latents are of, and by which codec: `LatentsManifest`
    grey.safetensors                      `grey`, what mid-grey video comes to: a latent frame h w c
    <split>-00003-of-00012                a record per crop: `LatentCrop`
    <split>_known-00003-of-00012          of each crop its conditioning latents, a record per number of known frames
    <split>_text-00003-of-00012           a record per distinct text of the shard, as its text encoder gives it
    dataset.json                          written last: how many crops each shard has

Of a causal codec an encode is exact only from the first frame on, so a crop is encoded from its own. The conditioning
latents of a crop (k known latent frames, then mid-grey ones) are put together of three parts: its own first k frames;
then, as long as the codec remembers them, frames of a record of k's own; then `grey`.
"""

import dataclasses
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import numpy as np
from etils import epath
from jaxtyping import Float, Int
from pydantic import Field
from safetensors.numpy import save

from lingbot_jax.config import Path, PositiveInt, build, config, require
from lingbot_jax.data.records import DATASET, DataError, ErrorBudget, Records, find_shards
from lingbot_jax.data.schema import TRACK, Captions, ClipError, Recording, Table, decode, read_arrays
from lingbot_jax.files import reached, read_json

FORMAT = 1
MANIFEST, GREY = "latents.json", "grey.safetensors"
STORED = "float16 or float32"
LATENTS: Table = {"latents": (STORED, ("t", "h", "w", "c")), **TRACK}
FRAMES: Table = {"latents": (STORED, ("t", "h", "w", "c"))}
GREY_FRAME: Table = {"grey": (STORED, ("h", "w", "c"))}
TOKENS: Table = {"text": (STORED, ("n", "d"))}
TEXT_BYTES = 256 << 20  # of encoded texts that a data set keeps on the host, the latest ones

Caption = Literal["narrative", "static", "scene"]
Stored = Literal["float16", "float32"]
Side = Annotated[int, Field(gt=0, le=16384)]
CropFrames = Annotated[int, Field(gt=0, le=1_000_001)]
Conditioning = Annotated[int, Field(gt=0, le=4096)]


@config
class LatentsManifest:
    """What a folder of latents is of."""

    clips: Path = Field(description="the clips that were encoded")
    codec: dict[str, Any] = Field(description="config of the codec")
    codec_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = Field(description="of its parameters")
    text: dict[str, Any] = Field(description="config of the text encoder")
    captions: tuple[Caption, ...] = Field(description="the captions that are encoded")
    temporal: bool = Field(description="whether they are encoded with each temporal caption behind them too")
    frames: CropFrames = Field(description="video frames of a crop")
    grid: CropFrames = Field(description="frames between the first frames of two crops of a clip")
    size: tuple[Side, Side] = Field(description="height and width of the video")
    dtype: Stored = Field(description="that latents are stored in")
    stride: PositiveInt = Field(description="video frames per latent frame")
    conditioning: Conditioning = Field(description="latent frames that may be known, at most")
    memory: Annotated[int, Field(ge=0, le=2**20)] = Field(
        description="latent frames after which the codec has forgotten what was before"
    )

    @property
    def latent_frames(self) -> int:
        """Of a crop."""
        return (self.frames - 1) // self.stride + 1

    @property
    def tail(self) -> int:
        """Latent frames behind the known ones that are stored for each number of these."""
        return min(self.memory, self.latent_frames - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class LatentCrop(Recording):
    """A crop of a clip: its latents, and what was recorded with them.

    Attributes:
      start: its first frame in the clip. texts: records of the text shard, in the order of `texts_of`.
    """

    latents: Float[np.ndarray, "t h w c"]
    start: int
    texts: tuple[int, ...]


def manifest_json(manifest: LatentsManifest) -> dict[str, Any]:
    """What latents.json holds."""
    return json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(manifest)}))


def texts_of(told: Captions, captions: tuple[Caption, ...], temporal: bool) -> list[str]:
    """Every text that a crop, a shorter one, or a part of one can have; each once."""
    prompts = [told.static if caption == "scene" else getattr(told, caption) for caption in captions]
    if "scene" in captions:
        prompts += [told.scene(event.start) for event in told.temporal if event.kind == "scene"]
    events = ["", *(event.text for event in told.temporal)] if temporal else []
    return list(dict.fromkeys([*prompts, *(with_event(prompt, e) for prompt in prompts for e in events)]))


def with_event(prompt: str, event: str) -> str:
    """The text of a part of a clip in which something happens, or "" does."""
    return f"{prompt} {event}".strip()


def read_manifest(folder: epath.PathLike, field: str = "config.data.path") -> LatentsManifest | None:
    """What a folder of latents is of; None: it holds none, but clips.

    Raises:
      ConfigError: it cannot be read, or is not finished.
    """
    with reached(folder, field):
        path = epath.Path(folder)
        if not (path / MANIFEST).exists():
            return None
        finished = (path / DATASET).exists()
    require(finished, field, str(folder), "latents that are not finished; run experiments.encode again")
    values = read_json(path / MANIFEST, field)
    version = values.pop("format", None)
    advice = f"this version reads latents of format {FORMAT}; encode the clips again"
    require(version == FORMAT, field, str(folder), f"format {version!r:.20}: {advice}")
    return build(LatentsManifest, values, str(path / MANIFEST))


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a run reads beside the latents themselves.

    Attributes:
      texts: the texts of a crop, in order, from what the loader has of it beside its pictures.
      known: latent conditioning frames of the rows of a step, from 1 on.
    """

    texts: Callable[[Mapping[str, Any]], list[str]]
    known: Callable[[int], Int[np.ndarray, "b"]]


class LatentRecords(Records):
    """The crops of a split, each with the conditioning latents and the texts that are asked for.

    Raises:
      DataError: as Records. ConfigError: a shard is missing.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        split: str,
        manifest: LatentsManifest,
        budget: ErrorBudget,
        within: str,
        field: str,
    ):
        super().__init__(find_shards(folder, split, field), budget, within)
        self.manifest, self._split = manifest, split
        self._texts = Cache(TEXT_BYTES)
        beside = ["text", "known"] if manifest.tail else ["text"]
        for name in beside:
            find_shards(folder, f"{split}_{name}", field)
        with reached(folder, field):
            self._grey = read_arrays((epath.Path(folder) / GREY).read_bytes(), GREY_FRAME)["grey"]

    def decode(self, blob: bytes) -> LatentCrop:
        """Raises ClipError: not a crop of this data set."""
        crop, own = decode(blob, LatentCrop, LATENTS), self.manifest
        shape = (len(crop), len(crop.latents), *crop.latents.shape[1:])
        wanted = (own.frames, own.latent_frames, *self._grey.shape)
        if shape != wanted or crop.latents.dtype != own.dtype:
            raise ClipError(f"a crop of (frames, t, h, w, c) = {shape}: must be {wanted}, of {own.dtype}")
        texts, places = texts_of(crop.captions, own.captions, own.temporal), (*crop.texts, crop.start)
        if len(places) != len(texts) + 1 or not all(isinstance(i, int) and i >= 0 for i in places):
            raise ClipError(f"start and texts of a crop = {places!r:.80}: must be {len(texts) + 1} places")
        return crop

    def conditioning(
        self, record: int, latents: Float[np.ndarray, "t h w c"], known: int
    ) -> Float[np.ndarray, "t h w c"]:
        """The latents of the crop's first `known` latent frames and mid-grey ones behind them.

        Args:
          latents: of the crop, which may be shorter than stored. known: at most `manifest.conditioning`, where the
            codec remembers.

        Raises:
          ClipError: the record is damaged.
        """
        image = np.broadcast_to(self._grey, latents.shape).astype(latents.dtype)
        image[:known] = latents[:known]
        if self.manifest.tail and known < len(latents):
            require(
                known <= self.manifest.conditioning, "conditioning frames", known, "more than were encoded"
            )
            tail = self._beside("known", record, lambda index: index * self.manifest.conditioning + known - 1)
            found = read_arrays(tail, FRAMES)["latents"]
            if found.shape != (self.manifest.tail, *self._grey.shape):
                raise ClipError(f"conditioning latents of {found.shape}: not those of the crop")
            image[known : known + len(found)] = found[: len(latents) - known]
        return image

    def text(self, record: int, crop: LatentCrop, texts: list[str]) -> Float[np.ndarray, "n l d"]:
        """Tokens of texts of the crop, zero past the end of each.

        Raises:
          ClipError: the record is damaged, or such a text was not encoded.
        """
        manifest = self.manifest
        own = dict(
            zip(texts_of(crop.captions, manifest.captions, manifest.temporal), crop.texts, strict=True)
        )
        made = np.zeros((len(texts), manifest.text["length"], manifest.text["dim"]), np.float32)
        for row, text in zip(made, texts, strict=True):
            tokens = self._texts.get(text)
            if tokens is None:
                if text not in own:
                    raise ClipError(f"the text {text!r:.80} was not encoded")
                tokens = read_arrays(self._beside("text", record, lambda _, at=own[text]: at), TOKENS)["text"]
                self._texts.put(text, tokens, tokens.nbytes)
            if len(tokens) > len(row) or tokens.shape[1] != row.shape[1]:
                raise ClipError(f"a text of {tokens.shape}: must be within {row.shape}")
            row[: len(tokens)] = tokens
        return made

    def _beside(self, name: str, record: int, number: Callable[[int], int]) -> bytes:
        """A record of the shard `name` beside that of a crop: which, `number` says from the place of the crop."""
        path, index = self.place(record)
        path = path.with_name(path.name.replace(f"{self._split}-", f"{self._split}_{name}-", 1))
        return self.readers.read(path, number(index))


class Cache:
    """The latest values up to a number of bytes. Safe to share among threads."""

    def __init__(self, limit: int):
        self._limit, self._bytes, self._lock = limit, 0, threading.Lock()
        self._values: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    def get(self, key: str) -> Any | None:
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: str, value: Any, nbytes: int) -> None:
        with self._lock:
            self._bytes += nbytes - self._values.pop(key, (None, 0))[1]
            self._values[key] = value, nbytes
            while self._bytes > self._limit:
                self._bytes -= self._values.popitem(last=False)[1][1]


def stored(array: np.ndarray, dtype: str) -> np.ndarray:
    """As latents and texts are stored. Raises DataError: a number that float16 has not."""
    with np.errstate(over="ignore"):
        made = np.ascontiguousarray(array, dtype)
    if not np.isfinite(made).all():
        raise DataError(f"the encoder gave {np.abs(array).max():g}: must be within {np.finfo(dtype).max:g}")
    return made


def pack(name: str, array: np.ndarray) -> bytes:
    """One array as a record."""
    return save({name: array})
