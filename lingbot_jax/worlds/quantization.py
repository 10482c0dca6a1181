"""Parameters stored as int8: a matrix per output has a scale of its own, everything else stays bfloat16.

    blocks.ffn.up.kernel             int8     [layers in out]
    blocks.ffn.up.kernel.int8_scale  float32  [layers 1 out]     value = int8 * scale

Half the bytes of bfloat16, on the disk and on the way: what is read is the dtype that was asked for.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Float32, Int8, Shaped

from lingbot_jax.parallel import multihost
from lingbot_jax.worlds import storage

SCALE = ".int8_scale"
LEAST = 4096  # elements of a matrix that is worth it


def quantized(specs: storage.Specs) -> dict[str, jax.ShapeDtypeStruct]:
    """How the parameters of a transformer are stored as int8."""
    stored = {}
    for name, spec in specs.items():
        if not (name.endswith("kernel") and len(spec.shape) >= 2 and np.prod(spec.shape[-2:]) >= LEAST):
            stored[name] = jax.ShapeDtypeStruct(spec.shape, ml_dtypes.bfloat16)
            continue
        stored[name] = jax.ShapeDtypeStruct(spec.shape, np.int8)
        stored[name + SCALE] = jax.ShapeDtypeStruct((*spec.shape[:-2], 1, spec.shape[-1]), np.float32)
    return stored


def quantize(
    value: Shaped[np.ndarray, "*layers i o"],
) -> tuple[Int8[np.ndarray, "*layers i o"], Float32[np.ndarray, "*layers 1 o"]]:
    """The nearest multiples of a 127th of the largest value of each output: off by half a step at most."""
    value = value.astype(np.float32)
    scale = np.maximum(np.abs(value).max(-2, keepdims=True), np.finfo(np.float32).tiny * 127) / 127
    return np.rint(value / scale).astype(np.int8), scale


def read(folder: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """`storage.read`, of a folder whose arrays may be stored as int8."""
    with multihost.agree_on_errors(storage.Damaged):
        stored = storage.Reader(folder).specs
    scaled = [name for name in wanted if name + SCALE in stored]
    asked = dict(wanted)
    for name in scaled:
        place = wanted[name].sharding
        asked[name] = jax.ShapeDtypeStruct(wanted[name].shape, np.int8, sharding=place)
        if isinstance(place, jax.sharding.NamedSharding):
            place = jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec())
        asked[name + SCALE] = jax.ShapeDtypeStruct(stored[name + SCALE].shape, np.float32, sharding=place)
    values = storage.read(folder, asked)
    for name in scaled:
        spec = wanted[name]
        times = jax.jit(
            lambda q, s, d=spec.dtype: (q.astype(jnp.float32) * s).astype(d), out_shardings=spec.sharding
        )
        values[name] = times(values[name], values.pop(name + SCALE))
    return values


class Reader:
    """`storage.Reader`, of a folder whose arrays may be stored as int8: those are given as bfloat16."""

    def __init__(self, folder: epath.PathLike):
        """Raises Damaged."""
        self._reader = storage.Reader(folder)
        stored = self._reader.specs
        self._scaled = {name for name in stored if name + SCALE in stored}
        given = lambda n, s: jax.ShapeDtypeStruct(s.shape, ml_dtypes.bfloat16) if n in self._scaled else s
        self.specs = {name: given(name, spec) for name, spec in stored.items() if not name.endswith(SCALE)}

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One layer (None: the whole of an array). Raises Damaged."""
        value = self._reader.read(name, layer)
        if name not in self._scaled:
            return value
        return (value.astype(np.float32) * self._reader.read(name + SCALE, layer)).astype(ml_dtypes.bfloat16)
