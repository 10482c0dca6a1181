"""Work of block-causal attention over a ring, counted in tiles, and what attends on which platform."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.context import Context, valid_slots
from kernels_pallas.mask import Mask
from lingbot_jax.config import ConfigError
from lingbot_jax.parallel.mesh import MeshConfig, make_mesh
from lingbot_jax.parallel.sequence import PLAIN, attention_kernel, local_attention, local_mask

FRAME = 1560  # 480p


def contiguous_tiles(mask: Mask, devices: int, block: int) -> np.ndarray:
    """Visible tiles of each device if the tokens were split in one piece per device."""
    tiles = mask.tiles(block, block) > 0
    return np.array([part.sum() for part in np.array_split(tiles, devices)])


@pytest.mark.parametrize("frames, chunk", [(21, 3), (241, 3)])
def test_block_causal_work_is_balanced(frames, chunk):
    mask = Mask.block_causal(frames * FRAME, chunk * FRAME)
    # Every device has the same mask in each of the 8 steps of the ring (eight/check_sequence.py).
    each = 8 * (local_mask(mask, FRAME, 8).tiles(512, 512) > 0).sum()
    contiguous = contiguous_tiles(mask, 8, 512)
    assert contiguous.max() > 1.5 * contiguous.mean()
    # Cutting frames into parts costs tiles at the boundaries of chunks, not more.
    assert each < 1.15 * contiguous.mean() * (1 if frames > 100 else 1.3)


def test_pairs_are_kept():
    mask = Mask.block_causal(12 * 16, 3 * 16, window=9 * 16, sink=16)
    assert local_mask(mask, 16, 4).pairs * 4 * 4 == mask.pairs


def test_refusals_name_the_numbers():
    with pytest.raises(ConfigError, match="tokens per latent frame = 1560: must divide over 16 devices"):
        local_mask(Mask.full(FRAME, FRAME), FRAME, 16)
    with pytest.raises(
        ConfigError, match="mask = 100: its boundaries must be multiples of the 40 tokens per frame"
    ):
        local_mask(Mask.block_causal(200, 100), 40, 4)


def device(platform: str, kind: str):
    return mock.Mock(spec=jax.Device, platform=platform, device_kind=kind)


def test_the_platform_chooses_what_attends():
    assert local_attention(device("cpu", "cpu")) is PLAIN
    assert attention_kernel(make_mesh(MeshConfig()), heads=4).local is PLAIN
    v5p = local_attention(device("tpu", "TPU v5"))
    assert v5p.attention.keywords == {"generation": "v5p"}
    assert local_attention(device("tpu", "TPU v5")) is v5p  # static in jitted programs: one compilation
    with pytest.raises(ConfigError, match="device 'TPU v2': kernels are for TPU") as error:
        local_attention(device("tpu", "TPU v2"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "dtype, mask, slots, size, taken",
    [
        (jnp.bfloat16, Mask.full(8, 8), 0, 16, True),
        (jnp.float16, Mask.full(8, 8), 0, 128, True),
        (jnp.float32, Mask.full(8, 8), 0, 16, False),
        (jnp.bfloat16, Mask.block_causal(8, 4), 0, 16, False),
        (jnp.bfloat16, Mask.full(8, 8), 4, 16, False),
        (jnp.bfloat16, Mask.full(8, 8), 0, 20, False),  # cuDNN wants multiples of 8
    ],
)
def test_a_gpu_takes_cudnn_where_the_mask_is_full(monkeypatch, dtype, mask, slots, size, taken):
    calls = []

    def attend(q, k, v, implementation):
        calls.append(implementation)
        return PLAIN.attention(q, k, v, mask)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, size), dtype)
    context = Context(k[:, :slots], v[:, :slots], valid_slots((0, slots))) if slots else None
    out = local_attention(device("gpu", "NVIDIA H100")).attention(q, k, v, mask, context=context)
    assert calls == ["cudnn"] * taken
    np.testing.assert_array_equal(out, PLAIN.attention(q, k, v, mask, context=context))
