"""Writes the low-rank adapters of a run alone, as diffusers loads them: a safetensors file per network.

    pipe.load_lora_weights("OUT", weight_name="world.safetensors")
    pipe.load_lora_weights("OUT", weight_name="low.safetensors", load_into_transformer_2=True)

alpha / rank is in B already: every loader applies them as they are.
"""

import pathlib

import ml_dtypes
import numpy as np
from etils import epath
from safetensors.numpy import save_file

from lingbot_jax.config import ConfigError, require
from lingbot_jax.convert.names import layers_of, part_names
from lingbot_jax.convert.names_dit import lora_table
from lingbot_jax.files import is_remote, whole_folder
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.lora import LoraConfig
from lingbot_jax.worlds.checkpoints import Checkpoints
from lingbot_jax.worlds.merging import factors
from lingbot_jax.worlds.open import find
from lingbot_jax.worlds.world import Arrays

DTYPES = {"keep": np.float32, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def to_lora(source: epath.PathLike, out: epath.PathLike, dtype: str = "keep") -> None:
    """Writes `out`/NETWORK.safetensors of every network of a run, the averaged adapters.

    Args:
      dtype: keep (float32, as in the run), float32 or bfloat16.

    Raises:
      ConfigError: no run, or one without adapters; or `out` exists or cannot be written.
    """
    found = find(source, "source")
    if not found.lora.rank:
        raise ConfigError(
            f"source = {str(source)!r}: has no low-rank adapters; a run of --config.lora.rank has"
        )
    require(dtype in DTYPES, "dtype", dtype, f"must be one of {', '.join(DTYPES)}")
    require(not is_remote(out), "out", str(out), "adapters are written to a disk")
    checkpoints = Checkpoints(found.path, read_only=True)
    with whole_folder(out) as folder:
        for name, network in found.config.networks.items():
            arrays = checkpoints.averaged(name, factors(network, found.lora))
            tensors = named(arrays, network, found.lora, DTYPES[dtype])
            save_file(tensors, pathlib.Path(folder) / f"{name}.safetensors", metadata={"format": "pt"})


def named(
    arrays: Arrays, network: DiTConfig, config: LoraConfig, dtype: np.dtype = np.float32
) -> dict[str, np.ndarray]:
    """A and (alpha / rank) B of every layer by their names in diffusers."""
    tensors = {}
    for entry in lora_table(network, config):
        values = np.asarray(arrays[entry.ours])
        if entry.ours.endswith(".b_kernel"):
            values = config.scale * values
        for layer in layers_of(entry, values.shape):
            (name,), (value,) = part_names(entry, layer), entry.to_published(values[layer])
            tensors[name] = np.ascontiguousarray(value.astype(dtype))
    return tensors
