"""FLOPs that follow from sizes, against the number of weights."""

import dataclasses

import pytest

from lingbot_jax.models import params
from lingbot_jax.models.config import W14B
from lingbot_jax.models.control import is_adapter
from lingbot_jax.models.dit import WorldDiT
from lingbot_jax.models.flops import forward_flops, training_flops

SIZE = (21, 60, 104)  # 5 s at 480p: 32,760 tokens
TEXT = (
    40 * 2 * 5120**2 + 4096 * 5120 + 5120**2
)  # weights of cross-attention's k and v, and of the text embedding


def weights(config) -> dict[bool, int]:
    """Weights by whether they are an adapter's."""
    arrays = params.arrays_of(params.abstract(lambda key: WorldDiT(config, key)))
    sizes = {True: 0, False: 0}
    for path, leaf in arrays.items():
        sizes[is_adapter(path)] += leaf.size
    return sizes


@pytest.mark.parametrize("control", ["none", "cam"])
def test_flops_follow_the_parameters(control):
    """Almost every weight meets every token once: 2 FLOPs per weight and token, text aside."""
    config = dataclasses.replace(W14B, control=control)
    flops, have = forward_flops(config, *SIZE), weights(config)
    assert flops.tokens == pytest.approx(2 * 32760 * (have[False] - TEXT), rel=0.02)
    assert flops.adapters == pytest.approx(2 * 32760 * have[True], rel=0.001)
    assert flops.text == 2 * 512 * TEXT
    assert flops.attention == 40 * 4 * 32760**2 * 5120
    assert flops.cross == 40 * 4 * 32760 * 512 * 5120


def test_training_is_three_forward_passes():
    forward = forward_flops(W14B, *SIZE)
    parts = (forward.tokens, forward.adapters, forward.text, forward.cross, forward.attention)
    assert training_flops(W14B, *SIZE) == 3 * sum(parts)


def test_training_adapters_alone_spares_the_gradients_of_frozen_weights_and_of_text():
    config = dataclasses.replace(W14B, control="cam")
    have, n = weights(config), 32760
    expected = 2 * 2 * n * (have[False] - TEXT)  # forward, and the gradient of the input
    expected += 3 * 2 * n * have[True]
    expected += 2 * 512 * TEXT  # forward only
    expected += 40 * 5120 * (3 * 4 * n**2 + 2 * 4 * n * 512)  # gradients of cross-attention's queries alone
    assert training_flops(config, *SIZE, adapters_only=True) == pytest.approx(expected, rel=0.01)
