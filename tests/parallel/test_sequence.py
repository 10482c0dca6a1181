"""Work of block-causal attention over a ring, counted in tiles; no devices needed."""

import numpy as np
import pytest

from kernels_pallas.mask import Mask
from lingbot_jax.config import ConfigError
from lingbot_jax.parallel.sequence import stripe, visible_tiles

FRAME = 1560  # 480p


def contiguous_tiles(mask: Mask, devices: int, block: int) -> np.ndarray:
    """Visible tiles of each device if the tokens were split in one piece a device."""
    tiles = mask.tiles(block, block) > 0
    return np.array([part.sum() for part in np.array_split(tiles, devices)])


@pytest.mark.parametrize("frames, chunk", [(21, 3), (241, 3)])
def test_block_causal_work_is_balanced(frames, chunk):
    mask = Mask.block_causal(frames * FRAME, chunk * FRAME)
    striped = np.array(visible_tiles(mask, FRAME, 8, 512))
    contiguous = contiguous_tiles(mask, 8, 512)
    print(f"{frames} frames, visible 512x512 tiles a device: {striped.tolist()}, in one piece {contiguous}")
    assert striped.max() / striped.mean() <= 1.1
    assert contiguous.max() / contiguous.mean() > 1.5
    # Cutting frames into parts costs tiles at the boundaries of chunks, not more.
    assert striped.sum() < 1.15 * contiguous.sum() * (1 if frames > 100 else 1.3)


def test_pairs_are_kept():
    mask = Mask.block_causal(12 * 16, 3 * 16, window=9 * 16, sink=16)
    assert stripe(mask, 16, 4).pairs * 4 * 4 == mask.pairs


def test_refusals_name_the_numbers():
    with pytest.raises(ConfigError, match="tokens a latent frame = 1560: must divide over 16 devices"):
        stripe(Mask.full(FRAME, FRAME), FRAME, 16)
    with pytest.raises(ConfigError, match="mask = 100: its boundaries must be multiples of the 40 tokens"):
        stripe(Mask.block_causal(200, 100), 40, 4)
