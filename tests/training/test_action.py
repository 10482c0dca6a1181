"""The action stage trains adapters alone: no gradient, no optimiser state and no change for anything else."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.models.attention import Attend
from lingbot_jax.models.control import is_adapter
from lingbot_jax.models.dit import Condition
from lingbot_jax.training.state import abstract_state, init_state
from lingbot_jax.training.step import Batch, make_train_step
from tests.training import micro

# Wide feed-forward layers: parameters outweigh activations, so a gradient buffer cannot hide among them.
MODEL = dataclasses.replace(micro.MODEL, ffn=16384, layers=1)
STEPS = 3


def batch() -> Batch:
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.float32(rng.normal(size=(1, *shape)))
    video = (2, 2, 2)  # two tokens
    condition = Condition(
        text=make(MODEL.text_len, MODEL.text_dim),
        control=make(*video, MODEL.control_channels),
        mask=make(*video, MODEL.mask_channels),
        image=make(*video, MODEL.latent_channels),
    )
    return Batch(make(*video, MODEL.latent_channels), condition)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Each stage's config and its compiled step."""
    made = {}
    for stage in ("world", "action"):
        config = micro.config(
            tmp_path_factory.mktemp("unused"), "run", stage=stage, model=MODEL, curriculum=()
        )
        step = jax.jit(make_train_step(config, Attend()), donate_argnums=0)
        made[stage] = config, step.lower(abstract_state(config), batch()).compile()
    return made


def nbytes(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_frozen_parameters_have_no_optimiser_state_and_no_gradient_buffers(compiled):
    config, _ = compiled["action"]
    state = abstract_state(config)
    assert state.trainable and all(is_adapter(tuple(p.split(".")), None) for p in state.trainable)
    assert state.frozen and not any(is_adapter(tuple(p.split(".")), None) for p in state.frozen)
    assert state.ema.keys() == state.trainable.keys()
    adapters, frozen = nbytes(state.trainable), nbytes(state.frozen)
    assert adapters < 0.1 * frozen

    world, action = (compiled[stage][1].memory_analysis() for stage in ("world", "action"))
    inputs = nbytes(batch()) + 1024  # and counters
    # Parameters, EMA and two moments of everything; in stage action three of the four of adapters only.
    assert 0 <= world.argument_size_in_bytes - 4 * (adapters + frozen) < inputs
    assert 0 <= action.argument_size_in_bytes - (4 * adapters + frozen) < inputs
    # The backward pass of stage world holds a gradient of every parameter, that of stage action does not.
    assert world.temp_size_in_bytes > adapters + frozen
    assert action.temp_size_in_bytes < 0.5 * frozen
    assert world.temp_size_in_bytes - action.temp_size_in_bytes > 0.9 * frozen


def test_frozen_parameters_stay_bit_identical_and_adapters_move(compiled):
    config, step = compiled["action"]
    rng = np.random.default_rng(1)
    # Random values everywhere: adapters begin at zero, where half of them have no gradient yet.
    empty = abstract_state(config)
    shapes = {path: leaf.shape for path, leaf in (empty.trainable | empty.frozen).items()}
    arrays = {path: jnp.float32(0.1 * rng.normal(size=shape)) for path, shape in shapes.items()}
    before = {path: np.asarray(leaf) for path, leaf in arrays.items()}
    state = init_state(config, jax.tree.map(jnp.copy, arrays))
    for _ in range(STEPS):
        state, _ = step(state, batch())
    for path, leaf in state.frozen.items():
        np.testing.assert_array_equal(
            np.asarray(leaf).view(np.uint32), before[path].view(np.uint32), err_msg=path
        )
    for path, leaf in state.trainable.items():
        assert (np.asarray(leaf) != before[path]).mean() > 0.9, path
