"""Where every array lives: one table from logical axes to mesh axes (paper section 3.3.3).

Parameters, their gradients and the optimiser state are sharded over `fsdp` x `seq` (ZeRO-3): no device
holds a whole matrix between steps. A matrix is gathered, in the compute dtype, where it is used and its
gradient is scattered again there (`linear`; `gathered` for small parameters). Activations keep batch over
`data` x `fsdp` and the tokens *of each latent frame* over `seq`: `b t p d` with `p` split
(`constrain_tokens`). So every device holds an equal part of every frame, per-frame modulation needs no
communication, and block-causal attention is balanced by construction.

Play on few devices wants a chunk soon: gathering every matrix in every pass would take longer than the video lasts. On
a mesh with the axis `whole` the table's second column holds: parameters are whole on every device, nothing of them is
sent, and `linear` is a product of what a device has.

Model code calls `linear`, `gathered` and `constrain_tokens` unconditionally: they read the mesh that the caller
entered with `jax.set_mesh(mesh)`; one device has nothing to move, and there they do nothing. A module never holds a
mesh.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Format, Layout, with_layout_constraint
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lingbot_jax import axes as ax
from lingbot_jax.config import ConfigError
from lingbot_jax.parallel.mesh import BATCH_AXES, FSDP, SEQ, WHOLE

T = TypeVar("T")
Rules = Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]

# Every logical axis stands here once: its mesh axes where parameters are split, and where they are whole. EMBED is a
# dimension of every large matrix, so splitting it alone shards everything that weighs; one split dimension means one
# gather and one scatter a matrix.
PARAMETER_RULES: Rules = {
    ax.EMBED: ((FSDP, SEQ), ()),
    ax.NORM: ((FSDP, SEQ), ()),
    ax.LORA: ((FSDP, SEQ), ()),  # of adapters the wide side, whatever that of the adapted matrix is
    ax.LAYERS: ((), ()),  # scanned: a step of the scan needs its layer from every device
    ax.HEADS: ((), ()),
    ax.MLP: ((), ()),
    ax.INPUT: ((), ()),
    ax.OUTPUT: ((), ()),
    ax.VOCAB: ((), ()),
    ax.KERNEL: ((), ()),
    ax.RANK: ((), ()),
}


def spec(axes: tuple[str | None, ...], mesh: Mesh | AbstractMesh | None = None) -> PartitionSpec:
    """Mesh axes of an array whose dimensions have these logical axes (None: not split).

    Args:
      mesh: says which column of the table holds; None: the mesh of the program being traced.

    Raises:
      ConfigError: an axis that the table does not know, or one mesh axis for two dimensions.
    """
    column = WHOLE in (jax.sharding.get_abstract_mesh() if mesh is None else mesh).shape
    used: dict[str, str] = {}
    parts = []
    for name in axes:
        if name is not None and name not in PARAMETER_RULES:
            raise ConfigError(
                f"axes = {axes}: {name!r} is not in the sharding table ({', '.join(PARAMETER_RULES)})"
            )
        mesh_axes = () if name is None else PARAMETER_RULES[name][column]
        for mesh_axis in mesh_axes:
            if mesh_axis in used:
                raise ConfigError(
                    f"axes = {axes}: {used[mesh_axis]!r} and {name!r} both map to mesh axis {mesh_axis!r}; "
                    "name one of them differently"
                )
            used[mesh_axis] = name
        parts.append(mesh_axes or None)
    return PartitionSpec(*parts)


def _axes_of(variable: nnx.Variable, rank: int) -> tuple[str | None, ...]:
    axes = tuple(variable.get_metadata()["axes"])
    if rank < len(axes):  # e.g. a scalar statistic an optimiser keeps in the place of a parameter
        return (None,) * rank
    return (ax.LAYERS,) * (rank - len(axes)) + axes


def check_divides(name: str, size: int, mesh_axes: tuple[str, ...], mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError, with the numbers, unless the mesh axes split `size` evenly."""
    unknown = [a for a in mesh_axes if a not in mesh.shape]
    if unknown:
        raise ConfigError(f"{name}: mesh axis {unknown[0]!r} is not one of {tuple(mesh.shape)}")
    count = math.prod(mesh.shape[a] for a in mesh_axes)
    if size % count:
        raise ConfigError(f"{name}: {size} does not divide over {' x '.join(mesh_axes)} = {count} devices")


def shardings_by_path(tree: T, axes: Mapping[str, tuple[str | None, ...]], mesh: Mesh | AbstractMesh) -> T:
    """The tree with a NamedSharding for every array; works on abstract trees.

    Args:
      tree: keeps parameters in dictionaries by dotted path (`params.arrays_of`, an optimiser's state over them).
      axes: logical axes by path (`params.logical_axes`). A leaf below a key of it is placed by these axes
        where its rank is theirs; any other leaf (step counters) is replicated.

    Raises:
      ConfigError: see `spec`; also a dimension that its mesh axes do not divide, with the numbers.
    """

    def place(path, leaf):
        names = [key.key for key in path if getattr(key, "key", None) in axes]
        if not names or len(leaf.shape) != len(axes[names[-1]]):
            return NamedSharding(mesh, PartitionSpec())
        parts = spec(axes[names[-1]], mesh)
        for size, mesh_axes in zip(leaf.shape, parts, strict=True):
            check_divides(f"{names[-1]} {tuple(leaf.shape)}", size, mesh_axes or (), mesh)
        return NamedSharding(mesh, parts)

    return jax.tree_util.tree_map_with_path(place, tree)


def stacked_format(leaf: Any, place: NamedSharding) -> NamedSharding | Format:
    """Where and in which tiles a stack of matrices `[layers i o]` lies that is whole on every device.

    A tpu7x multiplies 16-bit matrices in tiles of 16 rows, where arrays have 8 by default: the compiler would convert
    all of them at the start of every program that reads them in a loop, for each of its loops.
    """
    whole = WHOLE in place.mesh.shape and len(leaf.shape) == 3 and leaf.shape[1] % 16 == 0
    if (
        not whole
        or jnp.dtype(leaf.dtype).itemsize != 2
        or not isinstance(place.mesh, Mesh)
        or place.mesh.devices.flat[0].device_kind != "TPU7x"
    ):
        return place
    return Format(Layout((0, 1, 2), ((16, 128), (2, 1))), place)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading dimension over `data` x `fsdp`; for every array of a batch.

    Latents stay whole over `seq`: a sample is megabytes, and latent frames (4n+1 of video) rarely divide.
    The tokens made from them are split over `seq` by `constrain_tokens`.
    """
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def specs(tree: T, placed: T) -> T:
    """Abstract `tree` carrying its shardings: arguments of an ahead-of-time compilation, or the template that
    a checkpoint is restored onto."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, placed
    )


def is_split() -> bool:
    """Whether the program being traced is for several devices; with one, there is nothing to place or to gather."""
    return jax.sharding.get_abstract_mesh().size > 1


def platform() -> str:
    """What the program being traced is for: tpu, gpu or cpu; by the mesh, else by where JAX runs."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def gathered(parameter: nnx.Param, dtype: Any = None) -> jax.Array:
    """A small parameter's value in `dtype`, whole on every device; matrices use `linear`.

    Backward, the gradient is pinned to the parameter's own sharding, so that a whole one is not kept. Under
    rematerialisation the gather is repeated, not saved.
    """
    value = parameter[...]
    dtype = value.dtype if dtype is None else dtype
    if not is_split():
        return value.astype(dtype)
    parts = spec(_axes_of(parameter, value.ndim))

    @jax.custom_vjp
    def gather(local):
        return jax.lax.with_sharding_constraint(local, PartitionSpec())

    def forward(local):
        return gather(local), None

    def backward(_, gradient):
        return (jax.lax.with_sharding_constraint(gradient, parts),)

    gather.defvjp(forward, backward)
    sharded = jax.lax.with_sharding_constraint(value.astype(dtype), parts)
    return gather(sharded)


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """Of a product whose operands have this dtype: without it TPUs round float32 operands to bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel with leading axes joined: XLA:CPU then forms the kernel's gradient in place, without copies."""
    rows = x.reshape(-1, x.shape[-1])
    return jnp.matmul(rows, kernel, precision=precision_of(x.dtype)).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _by_rows(x: jax.Array) -> jax.Array:
    """`x`, whose gradient lies in memory row by row: what the compiler lays out by columns it does not scatter."""
    return x


_by_rows.defvjp(lambda x: (x, None), lambda _, g: (with_layout_constraint(g, Layout((0, 1))),))


def linear(x: jax.Array, kernel: nnx.Param) -> jax.Array:
    """x @ kernel in x's dtype, where kernel `[i o]` is sharded: the weights move, the activations stay.

    Written with explicit collectives, because the compiler's own choice is worse: it sums whole gradients
    over all devices and then slices (twice the bytes, none of it overlapped), and on v5p it gathers over a
    whole slice by summing as well. Here each matrix is gathered over seq and then over fsdp, as the compute
    dtype; backward the transposes are two reduce-scatters and, between replicas, a sum of what is left.

    Args:
      x: `b t p i` with p split over seq (p = 1: one value a frame, not split), or `b ... i`.
    """
    if not is_split():
        return matmul(x, kernel[...].astype(x.dtype))
    parts = spec(_axes_of(kernel, kernel[...].ndim))
    tokens = x.ndim == 4 and x.shape[2] > 1
    placed = PartitionSpec(BATCH_AXES, None, SEQ) if tokens else PartitionSpec(BATCH_AXES)

    def product(x, local):
        whole = local.astype(x.dtype)
        split = [dim for dim, mesh_axes in enumerate(parts) if mesh_axes]
        # Split rows first: the TPU compiler scatters along rows, but sums a whole gradient to scatter columns.
        transposed = split == [1]
        whole = whole.T if transposed else whole
        for dim in split:
            for mesh_axis in reversed(parts[dim]):  # the last named axis is the minor one
                whole = jax.lax.all_gather(whole, mesh_axis, axis=0 if transposed else dim, tiled=True)
        whole = _by_rows(whole)
        return matmul(x, whole.T if transposed else whole)

    return jax.shard_map(product, in_specs=(placed, parts), out_specs=placed, check_vma=False)(x, kernel[...])


def constrain_tokens(tokens: jax.Array) -> jax.Array:
    """Pins activations `b t p ...` to batch over data x fsdp and each frame's tokens `p` over seq.

    Raises:
      ConfigError: the batch or a frame's tokens do not divide over their mesh axes, with the numbers.
    """
    if not is_split():
        return tokens
    mesh = jax.sharding.get_abstract_mesh()
    check_divides("batch", tokens.shape[0], BATCH_AXES, mesh)
    check_divides("tokens per latent frame", tokens.shape[2], (SEQ,), mesh)
    rest = (None,) * (tokens.ndim - 3)
    return jax.lax.with_sharding_constraint(tokens, PartitionSpec(BATCH_AXES, None, SEQ, *rest))


def constrain_cache(x: jax.Array) -> jax.Array:
    """Pins cached keys or values `layers b slots p h k` to batch over data x fsdp and heads over seq.

    It is what attention over a cache works on (`sequence`), so that a cache never moves. A batch or heads that do not
    divide stay whole.
    """
    if not is_split():
        return x
    return jax.lax.with_sharding_constraint(x, cache_spec(x.shape))


def cache_spec(shape: tuple[int, ...]) -> PartitionSpec:
    """Mesh axes of cached keys or values, see `constrain_cache`."""
    return PartitionSpec(None, _fits(shape[1], BATCH_AXES), None, None, _fits(shape[4], (SEQ,)))


def constrain_columns(x: jax.Array) -> jax.Array:
    """Pins images `b t h w c` to batch over data x fsdp and columns of pixels over seq: a decoder's convolutions then
    exchange the borders of what their devices have. Columns that do not divide stay whole."""
    if not is_split():
        return x
    return jax.lax.with_sharding_constraint(x, columns_spec(x.shape))


def columns_spec(shape: tuple[int, ...]) -> PartitionSpec:
    """Mesh axes of images, see `constrain_columns`."""
    return PartitionSpec(_fits(shape[0], BATCH_AXES), None, None, _fits(shape[3], (SEQ,)))


def _fits(size: int, mesh_axes: tuple[str, ...]) -> tuple[str, ...] | None:
    """These mesh axes, or None if they do not divide the size."""
    shape = jax.sharding.get_abstract_mesh().shape
    return mesh_axes if size % math.prod(shape[a] for a in mesh_axes) == 0 else None


def constrain_batch(x: jax.Array) -> jax.Array:
    """Pins `b ...` to batch over data x fsdp; whole on every device where the batch does not divide."""
    if not is_split():
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(_fits(x.shape[0], BATCH_AXES)))


def take_rows(table: nnx.Param, ids: jax.Array) -> jax.Array:
    """Rows `ids` of a sharded `[rows d]` table, split as the table's: what moves is the ids, never the table."""
    if not is_split():
        return table[...][ids]
    parts = spec(_axes_of(table, table[...].ndim))
    found = table[...][jax.lax.with_sharding_constraint(ids, PartitionSpec())]
    return jax.lax.with_sharding_constraint(found, PartitionSpec(*(None,) * ids.ndim, *parts[1:]))


def count_bytes(tree: Any) -> int:
    """Bytes one device holds of a tree that carries shardings (jnp arrays or ShapeDtypeStructs)."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
