"""The shape annotations of public functions are enforced in the tests (see conftest.py)."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from lingbot_jax.models import layers, rope


def test_wrong_rank_and_dtype_are_refused():
    with pytest.raises(TypeCheckError, match="b t h w c"):
        layers.patchify(jnp.zeros((3, 4, 4, 2)), (1, 2, 2))
    with pytest.raises(TypeCheckError, match="position"):
        rope.cos_sin(jnp.zeros(3, bool), np.ones(2))


def test_axes_must_agree_between_arguments():
    from lingbot_jax.models.control import inject

    x = jnp.zeros((1, 2, 3, 4))
    with pytest.raises(TypeCheckError, match="b t p d"):
        inject(x, x, jnp.zeros((1, 2, 3, 5)))
