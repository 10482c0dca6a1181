"""Named arrays <-> a folder, local or gs://: parameters of a bundle, checkpoints of a run, what a conversion writes.

    arrays/             Orbax: one plain Zarr array per name, uncompressed, chunks of one layer or less
    digests/metadata    {name: digest of its values}
    seal.json           {file: SHA-256} of every file that holds no values

Arrays can be written and read layer by layer, on a machine that could not hold one of them, and are restored each
straight into its place on any mesh, by every process its own part. A flipped bit changes either a value, which its
digest shows, or one of the sealed files. The digest does not depend on the sharding: it is a sum over elements.

Orbax and TensorStore raise many types of exceptions; they are turned into the two of this module here and nowhere else.
"""

import collections
import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from lingbot_jax.config import ConfigError
from lingbot_jax.files import is_remote
from lingbot_jax.parallel import multihost
from lingbot_jax.worlds import checksums
from lingbot_jax.worlds.checksums import ARRAYS, DIGESTS

CHUNK_BYTES = 64 << 20  # of a stored array: large enough to stream, small enough to restore in parallel
SLICE_BYTES = 1 << 20  # of an array on several devices: cutting smaller parts is not worth a program each
READ_BYTES = 4 << 30  # of arrays that are read at once

SHOWN = 5  # differences that an error names

Specs = Mapping[str, jax.ShapeDtypeStruct]


class Damaged(ConfigError):
    """A folder of arrays is missing, cut off, or was changed after it was written; `why`, without the folder."""

    @property
    def why(self) -> str:
        return str(self).partition(": cannot be read ")[2].strip("()")


def located(path: str | os.PathLike) -> epath.Path:
    """A path that does not depend on the working directory: local ones become absolute, gs:// ones stay."""
    text = os.fspath(path)
    return epath.Path(text if is_remote(text) else os.path.abspath(os.path.expanduser(text)))


def is_file(path: epath.Path) -> bool:
    """Whether a regular file is there: reading a pipe would wait for ever, and epath takes one for a file."""
    return path.is_file() if is_remote(path) else os.path.isfile(path)


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by dotted path: `params.world.blocks.ffn.up.kernel`."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


# --- Writing.


def _save_args(arrays: Mapping[str, Any]) -> ocp.args.CheckpointArgs:
    # Chunks are split over the leading axis first: no chunk holds two layers of a large parameter.
    chunked = {
        name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if len(a.shape) > 1 else ())
        for name, a in arrays.items()
    }
    return ocp.args.PyTreeSave(dict(arrays), save_args=chunked)


def item_handlers() -> dict[str, ocp.CheckpointHandler]:
    """Orbax's handlers of the items of a folder; its own defaults are another format."""
    return {ARRAYS: _handler(), DIGESTS: ocp.JsonCheckpointHandler()}


def items(arrays: Mapping[str, Any]) -> ocp.args.Composite:
    """Everything that Orbax is to save of named arrays. The digests are computed, and waited for, here."""
    digests = checksums.digests_of(arrays)
    return ocp.args.Composite(**{ARRAYS: _save_args(arrays), DIGESTS: ocp.args.JsonSave(digests)})


def write(folder: str | os.PathLike, arrays: Mapping[str, Any]) -> None:
    """Writes named arrays (by all processes, where they are spread over several) into a new folder.

    Raises:
      ConfigError: the folder cannot be written, or exists.
    """
    folder = located(folder)
    with _writing(folder):
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**item_handlers())) as checkpointer:
            checkpointer.save(folder, args=items(arrays))
        if jax.process_index() == 0:
            checksums.seal(folder)


class Writer:
    """Writes named arrays layer by layer; `close` completes the folder. For one process.

    Orbax makes the checkpoint around arrays of one element, which are then replaced by empty ones of the true shape.
    """

    def __init__(self, folder: str | os.PathLike, specs: Specs):
        """`specs` are shape and dtype by name; `folder` must not exist. Raises ConfigError."""
        self._folder, self._specs = located(folder), specs
        self._digests = dict.fromkeys(specs, 0)
        self._waiting: dict[tuple[str, int], dict[int, np.ndarray]] = collections.defaultdict(dict)
        single = {name: np.zeros((1,) * len(s.shape), s.dtype) for name, s in specs.items()}
        with _writing(self._folder):
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**item_handlers())) as checkpointer:
                checkpointer.save(self._folder, args=ocp.args.Composite(**{ARRAYS: _save_args(single)}))
            self._stores = {name: _open(self._folder, name, spec).result() for name, spec in specs.items()}

    def write(self, name: str, layer: int | None, value: np.ndarray) -> None:
        """Writes one layer, once (None: the whole of an array that is not stacked). Raises ConfigError."""
        self._digests[name] = (self._digests[name] + checksums.layer_digest(value, layer)) % 2**32
        store, place = self._stores[name], ...
        if layer is not None:  # layers that share a chunk wait for each other
            rows = store.chunk_layout.write_chunk.shape[0]
            group = self._waiting[name, layer // rows]
            group[layer] = value
            if len(group) < rows:
                return
            value = np.stack([group[index] for index in sorted(group)])
            place = slice(min(group), min(group) + rows)
            del self._waiting[name, layer // rows]
        with _writing(self._folder):
            store[place].write(value).result()

    def close(self) -> None:
        """Adds digests and seal; a folder without them is refused.

        Raises:
          ConfigError: it cannot be written. ValueError: some layers of an array were never written.
        """
        if self._waiting:
            raise ValueError(f"{next(iter(self._waiting))[0]}: not all layers were written")
        with _writing(self._folder):
            (self._folder / DIGESTS).mkdir()
            (self._folder / DIGESTS / "metadata").write_text(json.dumps(self._digests))
            checksums.seal(self._folder)


# --- Reading.


class Reader:
    """Reads named arrays layer by layer. `specs`: shape and dtype by name."""

    def __init__(self, folder: str | os.PathLike):
        """Raises Damaged: no whole folder of arrays there."""
        self._folder = located(folder)
        with _reading(self._folder):
            checksums.check_seal(self._folder)
            self.specs, self._expected = _describe(self._folder)
            self._stores = {name: _open(self._folder, name).result() for name in self.specs}
        self._found = dict.fromkeys(self.specs, 0)
        self._left = {name: set(range(s.shape[0])) if s.shape else set() for name, s in self.specs.items()}

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One layer (None: the whole of an array).

        Raises:
          Damaged: it cannot be read; or it was the last layer of an array whose values do not match their digest.
        """
        store = self._stores[name]
        with _reading(self._folder):
            value = np.asarray((store if layer is None else store[layer]).read().result())
            if layer is None:
                checksums.compare({name: self._expected[name]}, {name: checksums.layer_digest(value, None)})
            elif layer in self._left[name]:
                self._left[name].remove(layer)
                self._found[name] = (self._found[name] + checksums.layer_digest(value, layer)) % 2**32
                if not self._left[name]:
                    checksums.compare({name: self._expected[name]}, self._found)
        return value


def read(folder: str | os.PathLike, wanted: Any, partial: bool = False) -> Any:
    """Arrays of a folder in the structure of `wanted`, each read straight into its place.

    Several processes call this together and read their own parts; all end alike. The arrays are converted to the
    wanted dtype after their digests are compared; what is held meanwhile is one array more than the larger of both.

    Args:
      wanted: a tree of ShapeDtypeStruct, by whose paths (`named`) the arrays are found. Without a sharding an array
        comes to the first device of this process. All shardings are of the same devices.
      partial: whatever is not wanted is let be.

    Raises:
      Damaged: the folder cannot be read, or values do not match their digest.
      ConfigError: the arrays do not fit `wanted`: the first five that are missing, surplus or misshapen.
    """
    folder, wanted = located(folder), _placed(wanted)
    names = named(wanted)
    with multihost.agree_on_errors(Damaged, ConfigError):
        with _reading(folder):
            checksums.check_seal(folder)
            stored, expected = _describe(folder)
        if partial:
            stored = {name: s for name, s in stored.items() if name in names}
        check_fit(f"{folder}", stored, names)
        with _reading(folder):
            values = _restore(folder, stored, names)
    with _reading(folder):
        checksums.compare(expected, checksums.digests_of(values))
    for name, spec in names.items():
        if values[name].dtype != spec.dtype:
            stored_as, values[name] = values[name], None
            values[name] = jax.jit(lambda x, d=spec.dtype: x.astype(d), out_shardings=spec.sharding)(
                stored_as
            )
            stored_as.delete()
    return jax.tree.unflatten(jax.tree.structure(wanted), list(values[name] for name in names))


def _restore(folder: epath.Path, stored: Specs, wanted: Specs) -> dict[str, jax.Array]:
    """Arrays as they are stored, where they are wanted. A part that several devices share is read once."""
    stores = {name: _open(folder, name) for name in wanted}
    place_of = lambda index: tuple((part.start, part.stop) for part in index)
    values, started, held = {}, collections.deque(), 0

    def finish():
        name, parts, size = started.popleft()
        read = {place: part.result() for place, part in parts.items()}
        values[name] = jax.make_array_from_callback(
            stored[name].shape, wanted[name].sharding, lambda i: read[place_of(i)], dtype=stored[name].dtype
        )
        return size

    for name, spec in wanted.items():
        store = stores[name].result()
        indices = spec.sharding.addressable_devices_indices_map(tuple(stored[name].shape)).values()
        parts = {place_of(index): store[index] for index in indices}
        size = sum(part.size for part in parts.values()) * store.dtype.numpy_dtype.itemsize
        started.append((name, {place: part.read() for place, part in parts.items()}, size))
        held += size
        while held > READ_BYTES and len(started) > 1:
            held -= finish()
    while started:
        finish()
    return values


def check_fit(where: str, stored: Specs, wanted: Specs) -> None:
    """Raises ConfigError unless the stored arrays are those wanted: one line, the first five and a count."""
    wrong = [f"missing {name}" for name in wanted if name not in stored]
    wrong += [f"surplus {name}" for name in stored if name not in wanted]
    wrong += [
        f"misshapen {name} {list(stored[name].shape)}, needs {list(spec.shape)}"
        for name, spec in wanted.items()
        if name in stored and stored[name].shape != tuple(spec.shape)
    ]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ConfigError(f"{where}: {len(wrong)} arrays do not fit: {'; '.join(wrong[:SHOWN])}{more}")


def _placed(wanted: Any) -> Any:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    place = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=s.sharding or here)
    return jax.tree.map(place, wanted)


def _describe(folder: epath.Path) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, int]]:
    """Shapes and digests of the stored arrays by name."""
    if not (folder / ARRAYS).is_dir():
        raise ValueError("no arrays there")
    tree = _handler().metadata(folder / ARRAYS).tree
    specs = {name: jax.ShapeDtypeStruct(m.shape, m.dtype) for name, m in tree.items()}
    digests = json.loads((folder / DIGESTS / "metadata").read_text())
    if digests.keys() != specs.keys():
        raise ValueError("digests are not those of the arrays")
    return specs, digests


# --- Orbax and TensorStore.


def _handler() -> ocp.PyTreeCheckpointHandler:
    handlers = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE_BYTES)),
    )
    # Not compressed: every bit of a chunk is one of a value, and parameters hardly shrink.
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=handlers)


def _open(folder: epath.Path, name: str, new: jax.ShapeDtypeStruct | None = None) -> tensorstore.Future:
    """An array of a folder; with `new`, an empty one of that shape takes its place."""
    path = os.fspath(folder / ARRAYS / name)
    place = f"{path}/" if is_remote(path) else {"driver": "file", "path": path}
    # Zeros are values too: what is missing is damage.
    zeros = {"fill_missing_data_reads": False, "store_data_equal_to_fill_value": True}
    spec = {"driver": "zarr", "kvstore": place} | zeros
    if new is None:
        return tensorstore.open(spec, open=True)
    layout = {"shape": list(new.shape), "chunks": _chunks(new), "compressor": None}
    spec |= {"dtype": np.dtype(new.dtype).name, "metadata": layout}
    (folder / ARRAYS / name).rmtree()
    return tensorstore.open(spec, create=True)


def _chunks(spec: jax.ShapeDtypeStruct) -> list[int]:
    """A chunk of at most CHUNK_BYTES: leading axes are divided first, so none holds two layers of a large array."""
    chunk = list(spec.shape)
    for axis, size in enumerate(spec.shape):
        while math.prod(chunk) * np.dtype(spec.dtype).itemsize > CHUNK_BYTES and chunk[axis] > 1:
            chunk[axis] = next(n for n in range(chunk[axis] - 1, 0, -1) if size % n == 0)
    return chunk


@contextlib.contextmanager
def errors_as(kind: Callable[[str], Exception]) -> Iterator[None]:
    """Turns what Orbax, TensorStore and file systems raise, many types, into `kind(reason)`.

    ConfigError passes, and so does what tells of another process and not of files.
    """
    try:
        yield
    except (ConfigError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        raise kind(reason(error)) from error


def _reading(folder: epath.Path) -> contextlib.AbstractContextManager[None]:
    return errors_as(lambda why: Damaged(f"{folder}: cannot be read ({why})"))


def _writing(folder: epath.Path) -> contextlib.AbstractContextManager[None]:
    return errors_as(lambda why: ConfigError(f"{folder}: cannot be written ({why})"))


def reason(error: BaseException) -> str:
    """An error in a few words: where a system call failed, the system's (`No space left on device`)."""
    found = re.search(r"(?:OS error |os_error_code='|Errno )(\d+)", str(error))  # of TensorStore, of Python
    text = os.strerror(int(found[1])) if found else str(error) or type(error).__name__
    return text.strip().splitlines()[0][:160]
