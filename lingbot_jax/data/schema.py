"""A clip on disk: one safetensors blob, arrays and a JSON metadata header (docs/data.md).

Every clip is checked when it is written and again when it is read. Arrays, f frames of h x w pixels:

    frames      uint8    [f h w 3]  RGB
    keys        uint8    [f 8]      0 or 1; W A S D I J K L held during the transition INTO frame i; row 0 zeros
    c2w         float64  [f 4 4]    camera to world, OpenCV axes (x right, y down, z forward); one step of a
                                    movement key is 0.05 world units
    intrinsics  float32  [f 4]      fx fy cx cy in pixels of the stored frame, pixel centres at +0.5
    timestamps  float64  [f]        seconds, increasing
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import numpy as np
import pydantic_core
from jaxtyping import Float, Float64, UInt8
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from lingbot_jax.config import ConfigError

SCHEMA_VERSION = 1
SPLITS = ("train", "held_out")
HEADER_KEY = "clip"  # one metadata key: safetensors writes several in random order
RIGID = 1e-6  # allowed deviation of R^T R from the identity; poses are float64
FAR = 1e6  # world units, pixels, seconds: nothing is larger in a recording, and its squares stay finite in float32
HEADER_LIMIT = 2**24  # bytes of a record's header: captions of some megabytes are a mistake

# name -> (dtypes, dimensions): a letter is a size shared by the arrays, a number is fixed.
Table = Mapping[str, tuple[str, tuple[str | int, ...]]]
TRACK: Table = {
    "keys": ("uint8", ("f", 8)),
    "c2w": ("float64", ("f", 4, 4)),
    "intrinsics": ("float32", ("f", 4)),
    "timestamps": ("float64", ("f",)),
}
ARRAYS: Table = {"frames": ("uint8", ("f", "h", "w", 3)), **TRACK}
_DTYPES = {"U8": "uint8", "F16": "float16", "F32": "float32", "F64": "float64"}  # safetensors -> NumPy


R = TypeVar("R", bound="Recording")


class ClipError(ConfigError):
    """A clip that is not what the schema says. One line, as every user error."""


@dataclasses.dataclass(frozen=True)
class Event:
    """What happens from `start` to `end` (seconds of the clip's timestamps): to the camera, or in the scene."""

    start: float
    end: float
    text: str
    kind: Literal["camera", "scene"] = "camera"


@dataclasses.dataclass(frozen=True)
class Captions:
    """The three layers of paper section 2.3: the whole story, the place alone, and timed events."""

    narrative: str
    static: str
    temporal: tuple[Event, ...]

    def scene(self, second: float) -> str:
        """The static caption, and the latest event in the scene that has begun by then."""
        begun = [e for e in self.temporal if e.kind == "scene" and e.start <= second]
        return " ".join([self.static, *(e.text for e in begun[-1:])])

    def at(self, times: Float64[np.ndarray, "f"]) -> list[str]:
        """What happens at each time: the text of the event that began last of those that have not ended, or ""."""
        now = lambda time: [e for e in self.temporal if e.start <= time <= e.end]
        return [max(now(time), key=lambda e: e.start).text if now(time) else "" for time in times]


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """What is recorded of a clip beside its pictures. Arrays as in the module docstring.

    Attributes:
      clip_id: unique in its data set. source: which game or recorder made it. split: see SPLITS.
      map: scene name; a map is in one split only. seed: of the recording. behaviour: the policy's name.
      fps: nominal frames per second. captions: of the recording.
      extra: JSON values that the source wants to keep (engine version, units, ...).
    """

    keys: UInt8[np.ndarray, "f 8"]
    c2w: Float64[np.ndarray, "f 4 4"]
    intrinsics: Float[np.ndarray, "f 4"]
    timestamps: Float64[np.ndarray, "f"]
    clip_id: str
    source: str
    split: Literal["train", "held_out"]
    map: str
    seed: int
    behaviour: str
    fps: float
    captions: Captions
    extra: Mapping[str, Any]

    def __len__(self) -> int:
        """Video frames."""
        return len(self.keys)

    def cut(self, start: int, frames: int) -> dict[str, np.ndarray]:
        """The arrays of TRACK of frames start .. start + frames, views but for the keys, whose row 0 is zeroed.

        Raises:
          ClipError: the clip is shorter.
        """
        _check(
            start >= 0 and start + frames <= len(self),
            f"clip {self.clip_id} has {len(self)} frames: cannot give {frames} from frame {start}",
        )
        cut = {name: getattr(self, name)[start : start + frames] for name in TRACK}
        cut["keys"] = cut["keys"].copy()
        cut["keys"][0] = 0
        return cut


@dataclasses.dataclass(frozen=True, eq=False)
class Clip(Recording):
    """One recording with its pictures."""

    frames: UInt8[np.ndarray, "f h w 3"]

    def crop(self, start: int, frames: int) -> "Clip":
        """The clip of frames start .. start + frames, as `cut`. Raises ClipError: the clip is shorter."""
        cut = self.cut(start, frames)
        return dataclasses.replace(self, frames=self.frames[start : start + frames], **cut)


def _check(ok: Any, message: str) -> None:
    if not ok:
        raise ClipError(message)


def validate(clip: Recording, table: Table = ARRAYS) -> None:
    """Raises ClipError with one line unless `clip` is what the schema says; `table`: its arrays."""
    sizes: dict[str, int] = {}
    for name, (dtype, dims) in table.items():
        array = getattr(clip, name)
        _check(isinstance(array, np.ndarray), f"{name} is {type(array).__name__}: must be a NumPy array")
        _check(array.dtype.name in dtype.split(" or "), f"{name} has dtype {array.dtype}: must be {dtype}")
        wanted = [
            sizes.setdefault(d, n) if isinstance(d, str) else d
            for d, n in zip(dims, array.shape, strict=False)
        ]
        _check(
            list(array.shape) == wanted and len(array.shape) == len(dims),
            f"{name} has shape {array.shape}: must be {dims} with {sizes}",
        )
        _check(array.size, f"{name} has shape {array.shape}: must not be empty")
        if array.dtype.kind == "f":
            bad = np.argwhere(~np.isfinite(array))
            _check(not len(bad), f"{name} is not finite at frame {bad[0][0] if len(bad) else 0}")
            most = float(np.abs(array).max()) if name != "timestamps" else 0.0  # those may count from 1970
            _check(most <= FAR, f"{name} holds {most:g}: must be within +-{FAR:g}")
    _check((clip.keys <= 1).all(), f"keys holds {clip.keys.max()}: must be 0 or 1")
    _check(not clip.keys[0].any(), "keys row 0 is not zero: no transition leads into frame 0")
    _check((np.diff(clip.timestamps) > 0).all(), "timestamps do not increase")
    _check((clip.intrinsics[:, :2] > 0).all(), "intrinsics: focal lengths must be positive")
    rotation = clip.c2w[:, :3, :3]
    error = np.abs(np.swapaxes(rotation, 1, 2) @ rotation - np.eye(3)).max(axis=(1, 2))
    error = np.maximum(error, np.abs(clip.c2w[:, 3] - [0, 0, 0, 1]).max(axis=1))
    frame = int(np.argmax(error))
    _check(error[frame] < RIGID, f"c2w of frame {frame} is not a rigid pose: off by {error[frame]:.2g}")
    mirrored = np.flatnonzero(np.linalg.det(rotation) < 0)
    _check(not len(mirrored), f"c2w of frame {mirrored[0] if len(mirrored) else 0} is mirrored (det -1)")
    _validate_metadata(clip)


def _validate_metadata(clip: Recording) -> None:
    for name in ("clip_id", "source", "map", "behaviour"):
        value = getattr(clip, name)
        _check(isinstance(value, str) and value, f"{name} = {repr(value)[:200]}: must be a non-empty text")
    _check(clip.split in SPLITS, f"split = {repr(clip.split)[:200]}: must be one of {', '.join(SPLITS)}")
    _check(
        isinstance(clip.seed, int) and clip.seed >= 0,
        f"seed = {repr(clip.seed)[:200]}: must be an integer >= 0",
    )
    _check(
        isinstance(clip.fps, (int, float)) and 0 < clip.fps < np.inf,
        f"fps = {repr(clip.fps)[:200]}: must be positive",
    )
    _check(isinstance(clip.extra, Mapping), f"extra is {type(clip.extra).__name__}: must be a mapping")
    texts = (clip.captions.narrative, clip.captions.static, *(e.text for e in clip.captions.temporal))
    _check(all(isinstance(t, str) for t in texts), "captions: every caption must be a text")
    for event in clip.captions.temporal:
        numbers = isinstance(event.start, (int, float)) and isinstance(event.end, (int, float))
        _check(
            numbers and 0 <= event.start <= event.end < math.inf,
            f"captions.temporal: {event.start} .. {event.end} s is no span",
        )
        _check(
            event.kind in ("camera", "scene"),
            f"captions.temporal: kind {event.kind!r}: must be camera or scene",
        )


def encode(clip: Recording, table: Table = ARRAYS) -> bytes:
    """The clip as safetensors bytes. The same clip gives the same bytes.

    Raises:
      ClipError: the clip is not what the schema says.
    """
    validate(clip, table)
    fields = [f.name for f in dataclasses.fields(clip) if f.name not in table]
    header = {"schema_version": SCHEMA_VERSION, **{name: getattr(clip, name) for name in fields}}
    header["captions"] = dataclasses.asdict(clip.captions)
    header["extra"] = dict(clip.extra)
    arrays = {name: np.ascontiguousarray(getattr(clip, name)) for name in table}
    return save(arrays, metadata={HEADER_KEY: json.dumps(header, sort_keys=True)})


def decode(blob: bytes, kind: type[R] = Clip, table: Table = ARRAYS) -> R:
    """The clip in safetensors bytes. Its arrays are copied once out of `blob` (about 0.7 ms per megabyte).

    Raises:
      ClipError: not safetensors, cut off, another schema version, or not what the schema says.
    """
    clip = _clip(kind, read_arrays(blob, table), _metadata(blob))
    validate(clip, table)
    return clip


def read_arrays(blob: bytes, table: Table) -> dict[str, np.ndarray]:
    """The arrays of a safetensors blob, with types and sizes that NumPy can have. Raises ClipError."""
    length = _header_length(blob)
    _check(len(blob) >= 8 and length <= len(blob) - 8, f"{len(blob)} bytes are no whole safetensors blob")
    _check(length <= HEADER_LIMIT, f"a header of {length} bytes: must be at most {HEADER_LIMIT}")
    try:
        tensors = dict(deserialize(blob))
    except SafetensorError as error:
        said = str(error).removeprefix("Error while deserializing: ")
        raise ClipError(f"not safetensors: {' '.join(said.split())[:200]}") from None
    return {name: _array(name, tensors.get(name), table) for name in table}


def _header_length(blob: bytes) -> int:
    return int.from_bytes(blob[:8], "little")


def _array(name: str, tensor: dict[str, Any] | None, table: Table) -> np.ndarray:
    """One array as NumPy's; its sizes are checked before NumPy sees them, whose limits are narrower."""
    _check(tensor is not None, f"array {name} is missing")
    dtype, shape, (wanted, dims) = tensor["dtype"], tensor["shape"], table[name]
    _check(dtype in _DTYPES, f"{name} has dtype {dtype}: must be {wanted}")
    _check(len(shape) == len(dims), f"{name} has {len(shape)} dimensions: must be {dims}")
    _check(min(shape) > 0, f"{name} has shape {tuple(shape)}: must not be empty")
    return np.frombuffer(tensor["data"], _DTYPES[dtype]).reshape(shape)


def _metadata(blob: bytes) -> dict[str, Any]:
    """The metadata of a clip, from the safetensors header: the library checks that text but does not hand it out."""
    header = blob[8 : 8 + _header_length(blob)]
    try:
        meta = pydantic_core.from_json(pydantic_core.from_json(header)["__metadata__"][HEADER_KEY])
        version = meta.pop("schema_version")
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ClipError("safetensors without the metadata of a clip: written by something else?") from None
    advice = f"this program reads version {SCHEMA_VERSION}; collect the clips again"
    _check(version == SCHEMA_VERSION, f"schema_version = {str(version)[:20]!s}: {advice}")
    return meta


def _clip(kind: type[R], arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> R:
    try:
        captions = meta["captions"]
        captions["temporal"] = tuple(Event(**event) for event in captions["temporal"])
        meta["captions"] = Captions(**captions)
        return kind(**arrays, **meta)
    except (KeyError, TypeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ClipError(f"metadata of the clip is incomplete or foreign: {said}") from None
