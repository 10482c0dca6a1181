"""Which form and which tiles a kernel takes on which TPU generation.

The sizes come from `tile_table.py`, which `python -m tests.bench.search_tiles` writes from static schedules.
`choose` fits them to a shape: as many blocks as the size in the table gives, all as small as that allows, so
4,680 queries become two blocks of 2,432 and not five of 1,024.
"""

import dataclasses
from typing import Literal

import jax

from kernels_pallas.tile_table import TABLE

Generation = Literal["v5e", "v5p", "v6e", "tpu7x"]
LANES = 128
_MIB = 1 << 20
# VMEM of a TensorCore, MiB (public TPU pages), and what kernels may claim of it: the rest is the compiler's.
VMEM_MIB: dict[Generation, int] = {"v5e": 128, "v5p": 64, "v6e": 128, "tpu7x": 64}
_CLAIM = 0.875
_KINDS = (("v5 lite", "v5e"), ("v5e", "v5e"), ("v5", "v5p"), ("v6", "v6e"), ("7", "tpu7x"))


def generation(device: jax.Device) -> Generation:
    """The generation of a TPU device, by its device kind.

    Raises:
      ValueError: not a TPU these kernels have tiles for.
    """
    kind = device.device_kind.lower()
    if kind.startswith("tpu"):
        for name, found in _KINDS:
            if name in kind:
                return found
    raise ValueError(f"device {device.device_kind!r}: kernels are for TPU {', '.join(VMEM_MIB)}")


def _check(block_q: int, block_k: int, chunk: int, chunked: int):
    for name, value in (("block_q", block_q), ("block_k", block_k), ("chunk", chunk)):
        if value <= 0 or value % LANES:
            raise ValueError(f"tiles: {name} = {value}: must be a positive multiple of {LANES}")
    if chunked % chunk:
        raise ValueError(f"tiles: chunk = {chunk}: must divide the block of {chunked}")


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """A tile of block_q queries and block_k keys, computed `chunk` keys at a time; VMEM limit in bytes."""

    block_q: int
    block_k: int
    chunk: int
    vmem_limit: int | None = None

    def __post_init__(self):
        _check(self.block_q, self.block_k, self.chunk, self.block_k)


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """As ForwardTiles; `chunk` counts keys in the form "rows" and queries in the form "columns".

    `accumulator_bytes` is what the gradient of one head's queries may take in VMEM.
    """

    block_q: int
    block_k: int
    chunk: int
    form: Literal["rows", "columns"]
    accumulator_bytes: int = 16 * _MIB
    vmem_limit: int | None = None

    def __post_init__(self):
        _check(self.block_q, self.block_k, self.chunk, self.block_k if self.form == "rows" else self.block_q)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Of one call of `flash_attention`: its two forward forms and its backward kernel."""

    fixed_max: ForwardTiles
    stale_max: ForwardTiles
    backward: BackwardTiles


def fit(length: int, block: int, multiple: int) -> int:
    """The smallest multiple that covers `length` in no more blocks than `block` does."""
    blocks = -(-length // block)
    return -(-length // (blocks * multiple)) * multiple


def choose(chip: Generation, n: int, m: int, cached: bool = False) -> Tiles:
    """Tiles for n queries and m keys; `cached`: there is a context, and m counts its slots."""
    limit = int(VMEM_MIB[chip] * _CLAIM) * _MIB

    def forward(kind):
        block_q, block_k, chunk = TABLE[chip, kind]
        chunk = min(chunk, fit(m, chunk, LANES))
        return ForwardTiles(fit(n, block_q, LANES), fit(m, block_k, chunk), chunk, limit)

    block_q, block_k, chunk, form = TABLE[chip, "backward"]
    if form == "rows":
        chunk = min(chunk, fit(m, chunk, LANES))
        block_q, block_k = fit(n, block_q, LANES), fit(m, block_k, chunk)
    else:
        chunk = min(chunk, fit(n, chunk, LANES))
        block_q, block_k = fit(n, block_q, chunk), fit(m, block_k, LANES)
    # Tiles of doubled-buffered operands, scores and gradients need at most 20 MiB beside the accumulator.
    room = limit - 20 * _MIB
    backward = BackwardTiles(block_q, block_k, chunk, form, room, limit)
    return Tiles(forward("cached" if cached else "fixed_max"), forward("stale_max"), backward)
