"""Both optimisers decay the same parameters: matrices, wherever they stand, and nothing else (REVIEW R18's rule)."""

import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.training.config import OptimizerConfig
from lingbot_jax.training.state import learning_rate, make_optimizer

PATHS = {
    "blocks.ffn.up.kernel": (2, 4, 6),
    "blocks.ffn.up.bias": (2, 6),
    "blocks.modulation": (2, 6, 4),
    "head.projection.kernel": (4, 3),
    "patch.kernel": (1, 3, 4),
    "text.up.bias": (4,),
}


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_matrices_are_decayed_wherever_they_are_and_nothing_else(algorithm):
    config = OptimizerConfig(algorithm=algorithm, learning_rate=1e-2, warmup=0, weight_decay=0.1)
    optimizer = make_optimizer(config, 10)
    arrays = {path: jnp.ones(shape) for path, shape in PATHS.items()}
    zero = {path: jnp.zeros(shape) for path, shape in PATHS.items()}
    changes, _ = optimizer.update(zero, optimizer.init(arrays), arrays)
    for path, change in changes.items():
        rate = (
            config.muon_rate
            if algorithm == "muon" and path == "blocks.ffn.up.kernel"
            else config.learning_rate
        )
        expected = -rate * config.weight_decay if path.endswith("kernel") else 0.0
        np.testing.assert_allclose(change, expected, rtol=1e-5, err_msg=path)


def test_the_rate_warms_up_and_falls_to_zero_where_the_config_says():
    config = OptimizerConfig(learning_rate=1.0, warmup=10, decay="cosine")
    rate = learning_rate(config, 110)
    np.testing.assert_allclose(
        [rate(0), rate(5), rate(10), rate(60), rate(110)], [0, 0.5, 1, 0.5, 0], atol=1e-6
    )
