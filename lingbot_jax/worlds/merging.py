"""The parameters of a run with low-rank adapters, as those of a world without any."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from lingbot_jax.models import params
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.lora import LoraConfig, is_lora, merged
from lingbot_jax.worlds.world import Arrays, specs, template

Wanted = Mapping[str, jax.ShapeDtypeStruct]


def factors(network: DiTConfig, config: LoraConfig, mesh: jax.sharding.Mesh | None = None) -> Wanted:
    """A and B of every adapter by path, in float32; placed by the sharding table where there is a mesh."""
    module = template(network, config)
    arrays = params.arrays_of(module) if mesh is None else specs(module, mesh)
    return {path: leaf for path, leaf in arrays.items() if is_lora(path)}


def read_merged(
    read: Callable[[Wanted], Arrays], network: DiTConfig, config: LoraConfig, wanted: Wanted
) -> Arrays:
    """Parameters of `network` without adapters: every adapted matrix is W + (alpha / rank) A B, added in float32.

    Args:
      read: arrays of the run, in their places. wanted: all parameters of the network.
    """
    place = next(iter(wanted.values())).sharding
    low = factors(network, config, place and place.mesh)
    kernels = config.kernels()
    exact = {
        path: jax.ShapeDtypeStruct(wanted[path].shape, jnp.float32, sharding=wanted[path].sharding)
        for path in kernels
    }
    arrays = read({**wanted, **exact, **low})
    for path, (a, b) in kernels.items():  # one at a time: what is held twice is one matrix
        merge = _program(config.scale, wanted[path].dtype, wanted[path].sharding)
        arrays[path] = merge(arrays.pop(path), arrays.pop(a), arrays.pop(b))
    return arrays


@functools.lru_cache(maxsize=64)
def _program(scale: float, dtype: jnp.dtype, place: jax.sharding.Sharding | None) -> Callable[..., jax.Array]:
    return jax.jit(lambda w, a, b: merged(w, a, b, scale).astype(dtype), out_shardings=place)
