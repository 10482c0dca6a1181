"""Name tables: one declarative table per network, from which both directions of a conversion are derived.

A table is a list of `Entry(ours, published, layout)`:

    Entry("blocks.ffn.up.kernel", "blocks.{n}.ffn.0.weight", LINEAR)

`ours` is a dotted path of `params.flat_params(model)`. `{n}` in the published name is the layer index of a
stacked parameter, whose leading axis the layout does not mention. `layout` is an einops pattern
"published -> ours"; reading uses it left to right and writing right to left, so a round trip is exact.
A tuple of published names is stacked on a new leading axis of the pattern (separate q, k, v -> one kernel).

The tables are functions `table(config) -> list[Entry]` in `names_*.py`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

AS_IS = "... -> ..."
LINEAR = "o i -> i o"
CONV2D = "o i h w -> h w i o"
CONV3D = "o i t h w -> t h w i o"
CONV1X1 = "o i 1 1 -> i o"  # a 1x1 convolution is a linear layer over channels
SCALE2D = "c 1 1 -> c"
SCALE3D = "c 1 1 1 -> c"
LEADING_ONE = "1 ... -> ..."


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter of ours and the published tensor(s) it is made of.

    Attributes:
      ours: dotted path of the parameter.
      published: name of the tensor, with `{n}` for the layer of a stacked parameter; or several names.
      layout: einops pattern "published -> ours" of one layer.
      sizes: lengths of axes which the pattern joins in ours, to split them again: (("p", 2), ("q", 2)).
    """

    ours: str
    published: str | tuple[str, ...]
    layout: str = AS_IS
    sizes: tuple[tuple[str, int], ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Published names, always a tuple."""
        return (self.published,) if isinstance(self.published, str) else self.published

    @property
    def stacked(self) -> bool:
        """Whether ours has a leading axis of layers."""
        return "{n}" in self.parts[0]

    @property
    def _reverse(self) -> str:
        left, right = self.layout.split("->")
        return f"{right.strip()} -> {left.strip()}"

    def to_ours(self, tensors: list[np.ndarray]) -> np.ndarray:
        """One layer of ours from the published tensors, in the order of `parts`."""
        joined = tensors[0] if isinstance(self.published, str) else np.stack(tensors)
        return rearrange(joined, self.layout, **dict(self.sizes))

    def to_published(self, value: np.ndarray) -> list[np.ndarray]:
        """The published tensors, in the order of `parts`, from one layer of ours."""
        joined = rearrange(value, self._reverse, **dict(self.sizes))
        return [joined] if isinstance(self.published, str) else list(joined)

    def published_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each published tensor, from the shape of one layer of ours; nothing is allocated."""
        joined = _rearranged_shape(self._reverse, self.sizes, tuple(shape))
        return joined if isinstance(self.published, str) else joined[1:]


@functools.cache  # tables repeat a few shapes many times
def _rearranged_shape(
    pattern: str, sizes: tuple[tuple[str, int], ...], shape: tuple[int, ...]
) -> tuple[int, ...]:
    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda x: rearrange(x, pattern, **dict(sizes)), array).shape


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one published tensor goes: `part` of `entry`, in layer `layer` (None: not stacked)."""

    entry: Entry
    part: int
    layer: int | None
    shape: tuple[int, ...]


def layers_of(entry: Entry, shape: tuple[int, ...]) -> Iterator[int | None]:
    """Layer indices of a parameter of ours with this shape; just None where it is not stacked."""
    return iter(range(shape[0]) if entry.stacked else (None,))


def part_names(entry: Entry, layer: int | None) -> tuple[str, ...]:
    """Published names of one layer of an entry."""
    return tuple(part.format(n=layer) if layer is not None else part for part in entry.parts)


def expand(table: Iterable[Entry], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Slot]:
    """Every published name with the slot it fills, for a model whose parameters have these shapes.

    Args:
      table: entries that must cover the parameters exactly once.
      shapes: shape by dotted path (`params.flat_params` of an abstract model).

    Raises:
      ValueError: the table and the model disagree (a mistake in the code, not in a checkpoint).
    """
    table = list(table)
    named = [entry.ours for entry in table]
    twice = sorted({name for name in named if named.count(name) > 1})
    absent = sorted(set(named) - set(shapes))
    unnamed = sorted(set(shapes) - set(named))
    if twice or absent or unnamed:
        raise ValueError(
            f"name table: named twice {twice}; not in the model {absent}; not in the table {unnamed}"
        )
    slots: dict[str, Slot] = {}
    for entry in table:
        shape = tuple(shapes[entry.ours])
        published = entry.published_shape(shape[1:] if entry.stacked else shape)
        for layer in layers_of(entry, shape):
            for part, name in enumerate(part_names(entry, layer)):
                if name in slots:
                    raise ValueError(
                        f"name table: {name} fills both {slots[name].entry.ours} and {entry.ours}"
                    )
                slots[name] = Slot(entry, part, layer, published)
    return slots
