"""Published tensors as sources: safetensors (one file or shards with an index), `.pth` files, plain dicts.

A source knows the shape and dtype of every tensor without reading any, and reads one tensor at a time, so
that converting never holds more than one layer of one parameter.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from lingbot_jax import files
from lingbot_jax.config import ConfigError
from lingbot_jax.convert.names import Entry, Slot, expand, layers_of, part_names
from lingbot_jax.models import params

SHOWN = 5  # differences that an error names

# What safetensors calls the dtypes that a parameter may have.
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Attributes:
    shape: its shape. dtype: its NumPy dtype, or the name of one that parameters may not have.
    """

    shape: tuple[int, ...]
    dtype: np.dtype | str

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


@runtime_checkable
class Source(Protocol):
    """Attributes:
    name: where it comes from, for messages. tensors: what there is. metadata: texts of a safetensors file.
    """

    name: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    def read(self, name: str) -> np.ndarray:
        """One tensor."""


class Arrays:
    """A dict of arrays."""

    def __init__(self, arrays: Mapping[str, np.ndarray], name: str = "arrays"):
        self.name = name
        self.tensors = {key: Tensor(array.shape, array.dtype) for key, array in arrays.items()}
        self.metadata = {}
        self._arrays = arrays

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name]


class Safetensors:
    """One or several safetensors files. Only headers stay in memory: a file is mapped while it is read."""

    def __init__(self, files: list[pathlib.Path], weight_map: Mapping[str, str] | None = None):
        """`weight_map` (of an index.json): the file name of each tensor; it must agree with the files.

        Raises:
          ConfigError: a file is missing or damaged, or contradicts the index.
        """
        self.name = str(files[0].parent if len(files) > 1 else files[0])
        self.tensors: dict[str, Tensor] = {}
        self.metadata: dict[str, str] = {}
        self._file: dict[str, pathlib.Path] = {}
        wrong = []
        for path in files:
            tensors, metadata = _safetensors_header(path)
            for key, tensor in tensors.items():
                if weight_map is not None and weight_map.get(key) != path.name:
                    wrong.append(f"{key} is in {path.name}, the index says {weight_map.get(key)}")
                self.tensors[key], self._file[key] = tensor, path
            self.metadata |= metadata
        wrong += [
            f"{key} is not in {weight_map[key]}" for key in sorted(set(weight_map or ()) - set(self.tensors))
        ]
        if wrong:
            raise ConfigError(f"{self.name}: the index and the files disagree: {first_few(wrong)}")

    def read(self, name: str) -> np.ndarray:
        with safe_open(self._file[name], framework="numpy") as file:
            return file.get_tensor(name)


def first_few(wrong: list[str]) -> str:
    """The first five, and how many more there are."""
    more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    return "; ".join(text[:200] for text in wrong[:SHOWN]) + more


def _safetensors_header(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():  # nor a pipe, which would be waited for
        raise ConfigError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            tensors = {
                key: Tensor(tuple(s.get_shape()), DTYPES.get(s.get_dtype(), s.get_dtype()))
                for key, s in slices.items()
            }
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a whole safetensors file ({error})") from None


def open_safetensors(folder: pathlib.Path) -> Safetensors:
    """The tensors of a folder: shards with an `*.index.json`, or one `*.safetensors` file.

    Raises:
      ConfigError: neither, or several, or a damaged file.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        weight_map = files.read_json(indices[0], "source").get("weight_map")
        if not (isinstance(weight_map, dict) and weight_map):
            raise ConfigError(f"{indices[0]}: weight_map must be a group of tensor names with their files")
        for name, file in weight_map.items():
            if not isinstance(file, str) or os.path.basename(file) != file or file in ("", ".", ".."):
                raise ConfigError(
                    f"{indices[0]}: weight_map.{name[:200]} = {str(file)[:200]!r}: must be the name of a file beside it"
                )
        return Safetensors([folder / name for name in sorted(set(weight_map.values()))], weight_map)
    shards = sorted(folder.glob("*.safetensors"))
    if indices or len(shards) != 1:
        found = [path.name for path in indices or shards]
        raise ConfigError(
            f"{folder}: needs one *.safetensors.index.json or one *.safetensors; found {found[:SHOWN]}"
        )
    return Safetensors(shards)


class TorchFile:
    """A `.pth` state dict, mapped and read as weights only. Needs PyTorch: the `convert` extra."""

    def __init__(self, path: pathlib.Path):
        """Raises ConfigError: no PyTorch, no such file, or not a plain state dict."""
        try:
            import torch
        except ImportError:
            raise ConfigError(
                f"{path}: reading .pth files needs PyTorch; pip install 'lingbot_jax[convert]', "
                f"or convert it to {path.with_suffix('.safetensors').name} beside it"
            ) from None
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many types for damaged or unsafe files
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"{path}: not a state dict that can be read as weights only ({reason})"
            ) from None
        names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        if not (isinstance(state, dict) and all(isinstance(t, torch.Tensor) for t in state.values())):
            raise ConfigError(f"{path}: holds something else than named tensors")
        self.name = str(path)
        self.tensors = {
            key: Tensor(tuple(t.shape), DTYPES[names[t.dtype]] if t.dtype in names else str(t.dtype))
            for key, t in state.items()
        }
        self.metadata = {}
        self._state = state
        self._int16 = torch.int16

    def read(self, name: str) -> np.ndarray:
        tensor = self._state[name].contiguous()
        if tensor.dtype.itemsize == 2:  # PyTorch hands no bfloat16 to NumPy: the bits go over as integers
            return tensor.view(self._int16).numpy().view(self.tensors[name].dtype)
        return tensor.numpy()


def differences(slots: Mapping[str, Slot], source: Source) -> list[str]:
    """Everything that keeps `source` from filling the slots, one text per tensor."""
    found = [f"missing {name} {list(slots[name].shape)}" for name in slots if name not in source.tensors]
    for name, tensor in source.tensors.items():
        if name not in slots:
            found.append(f"surplus {name} {list(tensor.shape)}")
        elif tensor.shape != slots[name].shape:
            found.append(f"misshapen {name} {list(tensor.shape)}, needs {list(slots[name].shape)}")
        elif isinstance(tensor.dtype, str):
            found.append(f"unreadable {name}: dtype {tensor.dtype}, needs one of {', '.join(DTYPES)}")
    mixed = {}
    for name, slot in slots.items():
        if name in source.tensors:
            mixed.setdefault(slot.entry.ours, set()).add(str(source.tensors[name].dtype))
    found += [f"mixed dtypes {sorted(dtypes)} in {ours}" for ours, dtypes in mixed.items() if len(dtypes) > 1]
    return found


def read_layer(entry: Entry, layer: int | None, source: Source) -> np.ndarray:
    """One layer of one parameter of ours."""
    return entry.to_ours([source.read(name) for name in part_names(entry, layer)])


def fill(template: nnx.Module, table: list[Entry], source: Source) -> nnx.Module:
    """The module with the source's values in the template's dtypes, all in memory: for small networks.

    Args:
      template: the module, or its abstract form (`params.abstract`).

    Raises:
      ConfigError: the source does not fit; the first differences, by name.
    """
    graph, state = nnx.split(template)
    shapes = {path: leaf.shape for path, leaf in params.flat_params(template).items()}
    wrong = differences(expand(table, shapes), source)
    if wrong:
        raise ConfigError(f"{source.name}: {len(wrong)} tensors do not fit: {first_few(wrong)}")
    by_path = {entry.ours: entry for entry in table}
    filled = []
    for path, leaf in nnx.to_flat_state(state):
        entry = by_path[".".join(map(str, path))]
        value = [read_layer(entry, layer, source) for layer in layers_of(entry, leaf.shape)]
        whole = np.stack(value) if entry.stacked else value[0]
        filled.append((path, leaf.replace(jnp.asarray(whole, leaf.dtype))))
    return nnx.merge(graph, nnx.from_flat_state(filled))
