"""NoiseExperts: the right expert is chosen on the device, and only that one is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.models.attention import Attend, attend_local
from lingbot_jax.models.experts import NoiseExperts
from tests.models import worlds

RUNS = []


def counting(q, k, v, mask):
    jax.debug.callback(lambda: RUNS.append(1))
    return attend_local(q, k, v, mask)


@pytest.fixture(scope="module")
def experts():
    return worlds.random_model(lambda key: NoiseExperts(worlds.CONFIG, key))


@pytest.fixture(scope="module")
def compiled():
    return jax.jit(lambda model, *inputs: model(*inputs, attend=Attend(kernel=counting)))


@pytest.mark.parametrize("top, expert", [(947.0, "high"), (1000.0, "high"), (946.99, "low"), (0.0, "low")])
def test_boundary_routes_and_only_one_expert_runs(experts, compiled, top, expert):
    latents, timestep, condition = worlds.inputs()
    timestep = jnp.zeros_like(timestep).at[0, -1].set(top)  # given frames are at 0
    RUNS.clear()
    ours = jax.block_until_ready(compiled(experts, latents, timestep, condition))
    jax.effects_barrier()
    assert len(RUNS) == worlds.CONFIG.layers
    alone = compiled(experts.select(expert), latents, timestep, condition)
    np.testing.assert_allclose(ours, alone, atol=1e-6)
    assert compiled._cache_size() <= 2  # one program for the experts whatever the noise level, one for a DiT


def test_precomputed_condition_is_each_experts_own(experts, compiled):
    latents, timestep, condition = worlds.inputs()
    prepared = jax.jit(lambda m, c: m.precompute(c))(experts, condition)
    for level in (0.95, 0.5):
        now = jnp.full_like(timestep, level * 1000)
        expected = compiled(experts, latents, now, condition)
        np.testing.assert_allclose(compiled(experts, latents, now, prepared), expected, atol=2e-5)


def test_replace_exchanges_one_expert_and_leaves_the_old_ones(experts):
    halved = jax.tree.map(lambda p: p / 2, experts.high)
    made = experts.replace("high", halved)
    assert jnp.array_equal(made.high.head.projection.kernel, experts.high.head.projection.kernel / 2)
    assert jnp.array_equal(made.low.head.projection.kernel, experts.low.head.projection.kernel)
    assert not jnp.array_equal(made.high.head.projection.kernel, experts.high.head.projection.kernel)
    assert jax.tree.structure(made) == jax.tree.structure(experts)


def test_impossible_boundary_is_refused():
    with pytest.raises(ConfigError, match="boundary = 947.0: must be a noise fraction between 0 and 1"):
        NoiseExperts(worlds.CONFIG, jax.random.key(0), boundary=947.0)
