"""Digests of values and hashes of files: any flipped bit of a stored folder (`worlds.storage`) changes one of them."""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Shaped, UInt32

from lingbot_jax.files import write_whole

ARRAYS, DIGESTS, SEAL = "arrays", "digests", "seal.json"  # names in a folder


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


def digests_of(arrays: Mapping[str, Any]) -> dict[str, int]:
    """By name. A program per shape and sharding, not one of a whole state: parameters, moments and averages share it.

    One is waited for before the next starts: XLA's CPU client cannot run many collectives at a time.
    """
    return {name: int(_digest(arrays[name])) for name in sorted(arrays)}


def layer_digest(value: np.ndarray, layer: int | None) -> int:
    return int(_digest(value, np.uint32((layer or 0) * value.size % 2**32)))


def compare(expected: Mapping[str, int], found: Mapping[str, int]) -> None:
    wrong = [name for name in found if name in expected and found[name] != expected[name]]
    if wrong:
        raise ValueError(
            f"the values of {wrong[0]} do not match their digest: the files were changed after writing"
        )


def sha256_of(arrays: Mapping[str, Any]) -> str:
    """Of names, types, shapes and values. Every array must be whole in this process."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {value.dtype} {value.shape}\n".encode())
        total.update(value.tobytes())
    return total.hexdigest()


def seal(folder: epath.Path) -> None:
    """Notes the hash of every file that holds no values; the last thing that is written."""
    write_whole(folder / SEAL, json.dumps(_hashes(folder), indent=0))


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


def _hashes(folder: epath.Path) -> dict[str, str]:
    """SHA-256 of every file but the seal and those with values, by path in the folder."""
    inner = [folder / ARRAYS, folder / ARRAYS / "array_metadatas", folder / DIGESTS]
    found = [path for place in [folder, *inner] if place.is_dir() for path in place.iterdir()]
    # Folders are arrays, and what is in them chunks, apart from their own description.
    files = [f if f.is_file() else f / ".zarray" for f in found if f not in inner and SEAL not in f.name]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # on gs:// each takes a round trip
        digests = pool.map(lambda f: hashlib.sha256(f.read_bytes()).hexdigest(), files)
        return {os.fspath(f.relative_to(folder)): digest for f, digest in zip(files, digests, strict=True)}
