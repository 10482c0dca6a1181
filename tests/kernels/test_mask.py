import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from kernels_pallas.mask import FULL, PARTIAL, SKIP, Mask, Rows


def test_drawn_examples():
    assert Mask.block_causal(8, 2, window=4, sink=2).draw().splitlines()[::2] == [
        "##......",
        "####....",
        "##..##..",
        "##....##",
    ]
    assert Mask.full(4, 6).draw() == "\n".join(["######"] * 4)


@hypothesis.given(
    n=st.integers(1, 60),
    chunk=st.integers(1, 12),
    more=st.integers(0, 20),
    sink=st.integers(0, 7),
    cut=st.integers(0, 60),
)
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_block_causal_is_its_definition(n, chunk, more, sink, cut):
    """Against the definition written per pair of tokens; tiles against the dense array."""
    window = sink + chunk + more
    mask = Mask.block_causal(n, chunk, window, sink).limit(min(cut, n))
    q, k = np.arange(n)[:, None], np.arange(n)[None]
    end = (q // chunk + 1) * chunk
    want = (k < end) & ((k < sink) | (k >= end - (window - sink))) & (k < cut)
    np.testing.assert_array_equal(mask.dense(), want)
    assert mask.pairs == want.sum()
    tiles = mask.tiles(16, 8)
    for i, j in np.ndindex(*tiles.shape):
        tile = want[i * 16 : i * 16 + 16, j * 8 : j * 8 + 8]
        kind = FULL if tile.all() and tile.shape[1] == 8 else PARTIAL if tile.any() else SKIP
        assert tiles[i, j] == kind
    middle = n // 2
    np.testing.assert_array_equal(mask.queries(middle, n).dense(), want[middle:]) if middle < n else None


def test_masks_are_values():
    assert Mask.block_causal(9, 3) == Mask.block_causal(9, 3) and len({Mask.full(3, 3), Mask.full(3, 3)}) == 1
    assert Mask(4, 4, (Rows(0, 2, ((0, 4),)), Rows(2, 4, ((0, 2), (2, 4))))).is_full


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Mask.block_causal(8, 0), "chunk = 0"),
        (lambda: Mask.block_causal(8, 2, sink=2), "sink = 2"),
        (lambda: Mask.block_causal(8, 2, window=3, sink=2), "window = 3"),
        (lambda: Mask(4, 4, (Rows(0, 3, ()),)), "end at 3"),
        (lambda: Mask(4, 4, (Rows(0, 4, ((0, 5),)),)), r"lie in \[0, 4\)"),
        (lambda: Mask(1, 9, (Rows(0, 1, ((0, 1), (2, 3), (4, 5), (6, 7))),)), "at most 3"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        make()
