"""Parameters: shape, logical axes and initialiser stand once, in the line that creates the parameter.

Modules are Flax NNX modules used as immutable pytrees: `y = module(x)` is a pure function of both.
Everything about a model that is not a value (shardings, checkpoint templates, conversion targets, counts)
is derived from `abstract(make)`, which allocates nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from lingbot_jax import axes as ax

Module = TypeVar("Module", bound=nnx.Module)
Initializer = Callable[[jax.Array, Sequence[int], Any], jax.Array]

zeros: Initializer = jax.nn.initializers.zeros
ones: Initializer = jax.nn.initializers.ones
fan_in: Initializer = jax.nn.initializers.lecun_normal()  # over the last two axes: [..., in, out]


def normal(std: float) -> Initializer:
    return jax.nn.initializers.normal(std)


def param(
    key: jax.Array,
    shape: Sequence[int],
    axes: Sequence[str | None],
    init: Initializer = fan_in,
    dtype: Any = jnp.float32,
) -> nnx.Param:
    """Creates a parameter; `axes` names each dimension with a logical axis (None: never sharded).

    Raises:
      ValueError: the axes do not match the rank, or one is not in `axes.LOGICAL_AXES`.
    """
    if len(axes) != len(shape):
        raise ValueError(
            f"param: shape {tuple(shape)} has {len(shape)} dimensions, axes {tuple(axes)} name {len(axes)}"
        )
    unknown = [a for a in axes if a is not None and a not in ax.LOGICAL_AXES]
    if unknown:
        raise ValueError(f"param: unknown logical axes {unknown}; allowed: {ax.LOGICAL_AXES}")
    return nnx.Param(init(key, tuple(shape), dtype), axes=tuple(axes))


def stack(make: Callable[[jax.Array], nnx.Module], key: jax.Array, layers: int) -> nnx.Module:
    """Makes `layers` copies of a block with independent keys, parameters stacked on a leading axis."""
    return jax.vmap(make)(jax.random.split(key, layers))


def abstract(make: Callable[[jax.Array], nnx.Module]) -> nnx.Module:
    """The module `make(key)` with ShapeDtypeStructs for arrays; nothing is allocated."""
    return jax.eval_shape(make, jax.eval_shape(lambda: jax.random.key(0)))


def flat_params(module: nnx.Module) -> dict[str, nnx.Param]:
    """Parameters by dotted path, in a stable order."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(str(p) for p in path): leaf for path, leaf in flat}


def arrays_of(module: nnx.Module) -> dict[str, jax.Array | jax.ShapeDtypeStruct]:
    """Values of the parameters by dotted path; ShapeDtypeStructs of an abstract module."""
    return {path: leaf.get_value() for path, leaf in flat_params(module).items()}


def with_arrays(template: Module, arrays: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> Module:
    """The module with these parameters; `template` gives the structure and may be abstract."""
    graph, state = nnx.split(template, nnx.Param)
    flat = nnx.to_flat_state(state)
    values = [(path, leaf.replace(arrays[".".join(str(p) for p in path)])) for path, leaf in flat]
    return nnx.merge(graph, nnx.from_flat_state(values))


def logical_axes(module: nnx.Module) -> dict[str, tuple[str | None, ...]]:
    """Logical axes by dotted path. A stacked parameter has one more dimension than axes: it is `layers`."""
    named = {}
    for path, leaf in flat_params(module).items():
        axes = leaf.get_metadata()["axes"]
        named[path] = (ax.LAYERS,) * (len(leaf.shape) - len(axes)) + tuple(axes)
    return named


def count(module: nnx.Module) -> int:
    """Number of parameters (works on abstract modules)."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
