"""Tile sizes."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    block_q: int
    block_k: int
    chunk: int
    vmem_limit: int | None = None


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    block_q: int
    block_k: int
    chunk: int
    form: str
    vmem_limit: int | None = None
