"""Named arrays <-> a folder, local or gs://: parameters of a bundle, checkpoints of a run, what a conversion writes.

    arrays/             Orbax: one plain Zarr array per name, uncompressed, chunks of one layer or less
    digests/metadata    {name: digest of its values}
    seal.json           {file: SHA-256} of every file that holds no values

Arrays can be written and read layer by layer, on a machine that could not hold one of them, and are restored each
straight into its place on any mesh, by every process its own part. A flipped bit changes either a value, which its
digest shows, or one of the sealed files. The digest does not depend on the sharding: it is a sum over elements.

Orbax and TensorStore raise many types of exceptions; they are turned into the two of this module here and nowhere else.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jaxtyping import Array, Shaped, UInt32

from lingbot_jax.config import ConfigError
from lingbot_jax.parallel import multihost

ARRAYS, DIGESTS, SEAL = "arrays", "digests", "seal.json"
CHUNK_BYTES = 64 << 20  # of a stored array: large enough to stream, small enough to restore in parallel
SHOWN = 5  # differences that an error names

Specs = Mapping[str, jax.ShapeDtypeStruct]


class Damaged(ConfigError):
    """A folder of arrays is missing, cut off, or was changed after it was written. The message is one line."""


def located(path: str | os.PathLike) -> epath.Path:
    """A path that does not depend on the working directory: local ones become absolute, gs:// ones stay."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by dotted path: `params.world.blocks.ffn.up.kernel`."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


# --- Writing.


def save_args(arrays: Mapping[str, Any]) -> ocp.args.CheckpointArgs:
    """What Orbax is to write of named arrays, without their digests. For `item_handlers` beside it."""
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
    digests = {name: int(digest) for name, digest in _digests(dict(arrays)).items()}
    return ocp.args.Composite(**{ARRAYS: save_args(arrays), DIGESTS: ocp.args.JsonSave(digests)})


def write(folder: str | os.PathLike, arrays: Mapping[str, Any]) -> None:
    """Writes named arrays (by all processes, where they are spread over several) into a new folder.

    Raises:
      ConfigError: the folder cannot be written, or exists.
    """
    folder = located(folder)
    with _writing(folder):
        handler = ocp.CompositeCheckpointHandler(**item_handlers())
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder, args=items(arrays))
        if jax.process_index() == 0:
            seal(folder)


class Writer:
    """Writes named arrays layer by layer; `close` completes the folder. For one process.

    Orbax makes the checkpoint around arrays of zeros that take no memory and next to no disk, and the values are
    then written into its arrays.
    """

    def __init__(self, folder: str | os.PathLike, specs: Specs):
        """`specs` are shape and dtype by name; `folder` must not exist. Raises ConfigError."""
        self._folder, self._specs = located(folder), specs
        self._digests = dict.fromkeys(specs, 0)
        zeros = {name: np.broadcast_to(np.zeros((), s.dtype), s.shape) for name, s in specs.items()}
        with _writing(self._folder):
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**item_handlers())) as checkpointer:
                checkpointer.save(self._folder, args=ocp.args.Composite(**{ARRAYS: save_args(zeros)}))
            self._stores = {name: _store(self._folder, name) for name in specs}

    def write(self, name: str, layer: int | None, value: np.ndarray) -> None:
        """Writes one layer, once (None: the whole of an array that is not stacked). Raises ConfigError."""
        store = self._stores[name]
        with _writing(self._folder):
            (store if layer is None else store[layer]).write(value).result()
        self._digests[name] = (self._digests[name] + _layer_digest(value, layer)) % 2**32

    def close(self) -> None:
        """Adds digests and seal; a folder without them is refused. Raises ConfigError."""
        with _writing(self._folder):
            (self._folder / DIGESTS).mkdir()
            (self._folder / DIGESTS / "metadata").write_text(json.dumps(self._digests))
            seal(self._folder)


def seal(folder: epath.Path) -> None:
    """Notes the hash of every file that holds no values; the last thing that is written."""
    text = json.dumps(_hashes(folder), indent=0)
    partial = folder / f"{SEAL}.partial"
    partial.write_text(text)
    partial.replace(folder / SEAL)


# --- Reading.


class Reader:
    """Reads named arrays layer by layer. `specs`: shape and dtype by name."""

    def __init__(self, folder: str | os.PathLike):
        """Raises Damaged: no whole folder of arrays there."""
        self._folder = located(folder)
        with _reading(self._folder):
            check_seal(self._folder)
            self.specs, self._expected = _describe(self._folder)
            self._stores = {name: _store(self._folder, name) for name in self.specs}
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
                _compare({name: self._expected[name]}, {name: _layer_digest(value, None)})
            elif layer in self._left[name]:
                self._left[name].remove(layer)
                self._found[name] = (self._found[name] + _layer_digest(value, layer)) % 2**32
                if not self._left[name]:
                    _compare({name: self._expected[name]}, self._found)
        return value


def read(folder: str | os.PathLike, wanted: Any, partial: bool = False) -> Any:
    """Arrays of a folder in the structure of `wanted`, each read straight into its place.

    Several processes call this together and read their own parts; all end alike. The arrays are converted to the
    wanted dtype after their digests are compared; what is held meanwhile is one array more than the larger of both.

    Args:
      wanted: a tree of ShapeDtypeStruct, by whose paths (`named`) the arrays are found. Without a sharding an array
        comes to the first device of this process. All shardings are of the same devices.
      partial: only these arrays, of a folder that may hold others; else those are refused.

    Raises:
      Damaged: the folder cannot be read, or values do not match their digest.
      ConfigError: the arrays do not fit `wanted`: the first five that are missing, surplus or misshapen.
    """
    folder, wanted = located(folder), _placed(wanted)
    names = named(wanted)
    with multihost.agree_on_errors(Damaged, ConfigError):
        with _reading(folder):
            check_seal(folder)
            stored, expected = _describe(folder)
        check_fit(f"{folder}", stored, names, partial)
        template = {
            n: jax.ShapeDtypeStruct(s.shape, stored[n].dtype, sharding=s.sharding) for n, s in names.items()
        }
        arguments = ocp.checkpoint_utils.construct_restore_args(template)
        restore = ocp.args.PyTreeRestore(template, restore_args=arguments, partial_restore=True)
        with _reading(folder):  # the handler alone: Orbax's Checkpointer would wait for a process that failed
            values = _handler().restore(folder / ARRAYS, args=restore)
    with _reading(folder):
        _compare(expected, {name: int(digest) for name, digest in _digests(values).items()})
    for name, spec in names.items():
        if values[name].dtype != spec.dtype:
            stored_as, values[name] = values[name], None
            values[name] = jax.jit(lambda x, d=spec.dtype: x.astype(d), out_shardings=spec.sharding)(
                stored_as
            )
            stored_as.delete()
    return jax.tree.unflatten(jax.tree.structure(wanted), list(values[name] for name in names))


def check_fit(where: str, stored: Specs, wanted: Specs, partial: bool = False) -> None:
    """Raises ConfigError unless the stored arrays are those wanted: one line, the first five and a count."""
    wrong = [f"missing {name}" for name in wanted if name not in stored]
    wrong += [f"surplus {name}" for name in stored if name not in wanted and not partial]
    wrong += [
        f"misshapen {name} {list(stored[name].shape)}, needs {list(spec.shape)}"
        for name, spec in wanted.items()
        if name in stored and stored[name].shape != tuple(spec.shape)
    ]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ConfigError(f"{where}: {len(wrong)} arrays do not fit: {'; '.join(wrong[:SHOWN])}{more}")


def check_seal(folder: epath.Path) -> None:
    """Raises ValueError where a sealed file is gone, new or changed.

    A folder without a seal passes: the writer was killed after the last value and before the seal, and the digests
    still tell whether the values are whole.
    """
    if not (folder / SEAL).exists():
        return
    expected, found = json.loads((folder / SEAL).read_text()), _hashes(folder)
    changed = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    if changed:
        raise ValueError(f"{changed[0]} was changed after writing")


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


def _hashes(folder: epath.Path) -> dict[str, str]:
    """SHA-256 of every file but the seal and those with values, by path in the folder."""
    inner = [folder / ARRAYS, folder / ARRAYS / "array_metadatas", folder / DIGESTS]
    found = [path for place in [folder, *inner] if place.is_dir() for path in place.iterdir()]
    # Folders are arrays, and what is in them chunks, apart from their own description.
    files = [f if f.is_file() else f / ".zarray" for f in found if f not in inner and SEAL not in f.name]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # on gs:// each takes a round trip
        digests = pool.map(lambda f: hashlib.sha256(f.read_bytes()).hexdigest(), files)
        return {os.fspath(f.relative_to(folder)): digest for f, digest in zip(files, digests, strict=True)}


def _compare(expected: Mapping[str, int], found: Mapping[str, int]) -> None:
    wrong = [name for name in found if name in expected and found[name] != expected[name]]
    if wrong:
        raise ValueError(
            f"the values of {wrong[0]} do not match their digest: the files were changed after writing"
        )


# --- Digests.


@jax.jit
def _digests(arrays: dict[str, Any]) -> dict[str, jax.Array]:
    return {name: digest(array) for name, array in arrays.items()}


def digest(values: Shaped[Array, "..."], offset: int | UInt32[Array, ""] = 0) -> UInt32[Array, ""]:
    """The sum modulo 2^32 over all elements of a hash of (place, bits): any element that differs changes it.

    For one place the hash is a bijection of the bits, so a change of one element is always seen, and of several in
    all but one case of 2^32. Sums commute: the sharding does not matter, and layers can be added up.

    Args:
      values: of 1, 2 or 4 bytes per element.
      offset: place of the first element: `layer x size` of a layer.
    """
    if values.dtype == jnp.bool_:
        values = values.astype(jnp.uint8)
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    words = jax.lax.bitcast_convert_type(values, kinds[values.dtype.itemsize]).astype(jnp.uint32)
    place, stride = jnp.uint32(offset), 1
    for axis in reversed(range(words.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return _mix(words ^ _mix(place + jnp.uint32(0x9E3779B9))).sum(dtype=jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finaliser of MurmurHash3: a bijection of 32 bits in which every bit depends on every other."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


_digest = jax.jit(digest)


def _layer_digest(value: np.ndarray, layer: int | None) -> int:
    return int(_digest(value, np.uint32((layer or 0) * value.size % 2**32)))


# --- Orbax and TensorStore.


def _handler() -> ocp.PyTreeCheckpointHandler:
    handlers = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    # Not compressed: every bit of a chunk is one of a value, and parameters hardly shrink.
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=handlers)


def _store(folder: epath.Path, name: str) -> tensorstore.TensorStore:
    path = os.fspath(folder / ARRAYS / name)
    place = f"{path}/" if "://" in path else {"driver": "file", "path": path}
    return tensorstore.open({"driver": "zarr", "kvstore": place}, open=True).result()


@contextlib.contextmanager
def _reading(folder: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise many types for damaged files
        if lost(error):
            raise
        raise Damaged(f"{folder}: cannot be read ({reason(error)})") from error


@contextlib.contextmanager
def _writing(folder: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # and for what a disk refuses
        if lost(error):
            raise
        raise ConfigError(f"{folder}: cannot be written ({reason(error)})") from error


def lost(error: BaseException) -> bool:
    """Whether an error tells of another process, and not of files."""
    return isinstance(error, jax.errors.JaxRuntimeError)


def reason(error: BaseException) -> str:
    """An error in a few words: where a system call failed, the system's (`No space left on device`)."""
    found = re.search(r"(?:OS error |os_error_code='|Errno )(\d+)", str(error))  # of TensorStore, of Python
    text = os.strerror(int(found[1])) if found else str(error) or type(error).__name__
    return text.strip().splitlines()[0][:160]
