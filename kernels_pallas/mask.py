"""Who may attend to whom, as a value: per block of queries at most three half-open intervals of keys.

That one form covers everything a video transformer asks for. In these drawings a row is a query, a column a
key, a letter is visible, and tokens of one chunk (here 2 tokens) share their rows:

    Mask.full(4, 6)       Mask.block_causal(8, 2)     ... window=4          ... window=4, sink=2
      ######                ##......                    ##......              ##......
      ######                ##......                    ##......              ##......
      ######                ####....                    ####....              ####....
      ######                ####....                    ####....              ####....
                            ######..                    ..####..              ##..##..
                            ######..                    ..####..              ##..##..
                            ########                    ....####              ##....##
                            ########                    ....####              ##....##

A window counts its sink and its own chunk, as the published sampler does (window 18, sink 6 latent frames
means 6 sink frames and the 12 that end with the current chunk).

A Mask is static: it is a jit-time constant, hashable, and holds no array. The kernels read `tiles`, the
reference reads `dense`.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

SKIP, PARTIAL, FULL = 0, 1, 2  # what a tile of scores holds; the values `tiles` returns
MAX_INTERVALS = 3


class Rows(NamedTuple):
    """Queries [start, stop) see the keys of `keys`, sorted disjoint half-open intervals (at most three)."""

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]


def union(intervals) -> tuple[tuple[int, int], ...]:
    """Sorted, disjoint, non-empty; touching intervals become one."""
    out: list[tuple[int, int]] = []
    for start, stop in sorted((int(a), int(b)) for a, b in intervals if b > a):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        else:
            out.append((start, stop))
    return tuple(out)


@dataclasses.dataclass(frozen=True)
class Mask:
    """Visibility of m keys to n queries.

    Attributes:
      n: queries. m: keys.
      rows: blocks of queries in order, covering [0, n) without gaps; neighbours differ in their keys.
    """

    n: int
    m: int
    rows: tuple[Rows, ...]

    def __post_init__(self):
        merged: list[Rows] = []
        at = 0
        for start, stop, keys in self.rows:
            if start != at or stop <= start:
                raise ValueError(
                    f"Mask.rows: block [{start}, {stop}) must start at {at} and hold at least one query"
                )
            at, keys = stop, union(keys)
            if len(keys) > MAX_INTERVALS:
                raise ValueError(f"Mask.rows: {len(keys)} key intervals {keys}; at most {MAX_INTERVALS}")
            if keys and (keys[0][0] < 0 or keys[-1][1] > self.m):
                raise ValueError(f"Mask.rows: key intervals {keys} must lie in [0, {self.m})")
            if merged and merged[-1].keys == keys:
                merged[-1] = merged[-1]._replace(stop=stop)
            else:
                merged.append(Rows(start, stop, keys))
        if at != self.n:
            raise ValueError(f"Mask.rows: blocks end at {at}, n = {self.n}")
        object.__setattr__(self, "rows", tuple(merged))

    @classmethod
    def full(cls, n: int, m: int) -> "Mask":
        """Every query sees every key."""
        return cls(n, m, (Rows(0, n, ((0, m),)),))

    @classmethod
    def block_causal(cls, n: int, chunk: int, window: int | None = None, sink: int = 0) -> "Mask":
        """Queries see their own chunk and the chunks before it (paper section 3.4.1). All in tokens.

        Args:
          n: queries = keys; a last chunk may be shorter.
          chunk: tokens of a chunk.
          window: if given, keys a query sees at most: the `sink` first tokens and the last `window - sink`
            that end with its own chunk.
          sink: tokens at the start that stay visible beyond the window; needs a window.
        """
        if chunk <= 0:
            raise ValueError(f"block_causal: chunk = {chunk}: must be positive")
        if window is None and sink:
            raise ValueError(f"block_causal: sink = {sink} means nothing without a window")
        if window is not None and window < sink + chunk:
            raise ValueError(f"block_causal: window = {window}: must hold sink + chunk = {sink + chunk}")
        rows = []
        for start in range(0, n, chunk):
            stop = min(start + chunk, n)
            first = 0 if window is None else max(0, start + chunk - (window - sink))
            rows.append(Rows(start, stop, ((0, min(sink, stop)), (first, stop))))
        return cls(n, n, tuple(rows))

    def limit(self, length: int) -> "Mask":
        """The same mask where only the first `length` keys exist (the rest is padding)."""
        rows = tuple(
            r._replace(keys=tuple((min(a, length), min(b, length)) for a, b in r.keys)) for r in self.rows
        )
        return Mask(self.n, self.m, rows)

    def queries(self, start: int, stop: int) -> "Mask":
        """The mask of the queries [start, stop) alone; keys stay."""
        rows = (Rows(max(r.start, start) - start, min(r.stop, stop) - start, r.keys) for r in self.rows)
        return Mask(stop - start, self.m, tuple(r for r in rows if r.stop > r.start))

    @property
    def is_full(self) -> bool:
        return self.rows == (Rows(0, self.n, ((0, self.m),)),)

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs; 4 * pairs * head_dim are the FLOPs of one head's forward."""
        return sum((r.stop - r.start) * sum(b - a for a, b in r.keys) for r in self.rows)

    def dense(self) -> np.ndarray:
        """Bool [n m], True where visible."""
        out = np.zeros((self.n, self.m), bool)
        for start, stop, keys in self.rows:
            for a, b in keys:
                out[start:stop, a:b] = True
        return out

    def bounds(self) -> np.ndarray:
        """Int32 [n 3 2]: the key intervals of each query, padded with empty ones."""
        out = np.zeros((self.n, MAX_INTERVALS, 2), np.int32)
        for start, stop, keys in self.rows:
            if keys:
                out[start:stop, : len(keys)] = keys
        return out

    @functools.cache  # noqa: B019 - a Mask is a small value, and a few of them exist
    def tiles(self, block_q: int, block_k: int) -> np.ndarray:
        """Int8 [ceil(n / block_q) ceil(m / block_k)] of SKIP, PARTIAL, FULL.

        Keys past m are invisible, so an overhanging tile is at most PARTIAL; queries past n are nobody's and
        decide nothing.
        """
        edges = np.arange(0, self.m + block_k, block_k)[: -(-self.m // block_k) + 1]
        out = np.zeros((-(-self.n // block_q), len(edges) - 1), np.int8)
        for i in range(len(out)):
            some = np.zeros(len(edges) - 1, bool)
            every = np.ones(len(edges) - 1, bool)
            for r in self.rows:
                if r.stop <= i * block_q or r.start >= (i + 1) * block_q:
                    continue
                seen = np.zeros(len(edges) - 1, np.int64)
                for a, b in r.keys:
                    seen += np.maximum(0, np.minimum(edges[1:], b) - np.maximum(edges[:-1], a))
                some |= seen > 0
                every &= seen == block_k
            out[i] = np.where(every, FULL, np.where(some, PARTIAL, SKIP))
        return out

    def draw(self, width: int = 64) -> str:
        """A picture, one character a cell of tokens: `#` visible, `+` in part, `.` hidden."""
        cell = -(-max(self.n, self.m) // width)
        chars = np.array([".", "+", "#"])[self._cells(cell)]
        return "\n".join("".join(row) for row in chars)

    def _cells(self, cell: int) -> np.ndarray:
        """`tiles` of square cells, where a last column that overhangs m still counts as full."""
        tail = -self.m % cell
        wide = Mask(
            self.n,
            self.m + tail,
            tuple(
                r._replace(keys=tuple((a, b + tail * (b == self.m)) for a, b in r.keys)) for r in self.rows
            ),
        )
        return wide.tiles(cell, cell)
