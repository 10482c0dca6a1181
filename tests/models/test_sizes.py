"""The named sizes build without allocating, and have the parameters that arithmetic says."""

import dataclasses

import pytest

from lingbot_jax.models import params
from lingbot_jax.models.config import W1_3B, W14B, DiTConfig
from lingbot_jax.models.control import is_adapter
from lingbot_jax.models.dit import WorldDiT


def by_hand(c: DiTConfig) -> tuple[int, int]:
    """Parameters of the base network and of its adapters, written out from the published layout."""
    d = c.dim
    linear = lambda i, o: i * o + o
    attention = 4 * linear(d, d) + 2 * d  # q k v o, scales of q and k
    ffn = linear(d, c.ffn) + linear(c.ffn, d)
    block = 2 * attention + ffn + 6 * d + 2 * d  # modulation, affine norm
    patch = linear(c.in_channels * 4, d)
    text = linear(c.text_dim, d) + linear(d, d)
    time_embedding = linear(c.freq_dim, d) + linear(d, d) + linear(d, 6 * d)
    head = linear(d, 4 * c.latent_channels) + 2 * d
    adapters = c.layers * 4 * linear(d, d) + linear(4 * c.control_channels, d) + 2 * linear(d, d)
    return c.layers * block + patch + text + time_embedding + head, adapters


@pytest.mark.parametrize("config, millions", [(W14B, (14_290, 18_540)), (W1_3B, (1_420, 1_710))])
def test_parameter_counts(config, millions):
    model = params.abstract(lambda key: WorldDiT(config, key))
    sizes = {name: p.size for name, p in params.flat_params(model).items()}
    adapters = sum(size for name, size in sizes.items() if is_adapter(name))
    base, expected_adapters = by_hand(config)
    assert (sum(sizes.values()) - adapters, adapters) == (base, expected_adapters)
    # The published round figures, to the last digit they give (FACTS: 14.29B and 18.54B).
    assert [round(n / 1e7) for n in (base, base + adapters)] == [n // 10 for n in millions]
    bare = params.abstract(lambda key: WorldDiT(dataclasses.replace(config, control="none"), key))
    assert params.count(bare) == base


def test_every_parameter_has_axes_for_the_sharding_table():
    model = params.abstract(lambda key: WorldDiT(W14B, key))
    for name, axes in params.logical_axes(model).items():
        used = [a for a in axes if a is not None]
        assert len(used) == len(set(used)), (name, axes)  # no mesh axis for two dimensions
        assert ("layers" in axes) == name.startswith("blocks."), (name, axes)
        if len(params.flat_params(model)[name].shape) - ("layers" in axes) > 1:
            assert "embed" in axes or "norm" in axes, (name, axes)  # what weighs is split
