"""The action stage trains adapters alone, as low-rank ones do in any: no gradient, no optimiser state and no change for
anything else."""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.models import params
from lingbot_jax.models.control import is_adapter
from lingbot_jax.models.lora import LoraConfig, is_lora
from lingbot_jax.parallel.mesh import make_mesh
from lingbot_jax.training.objectives import Constants
from lingbot_jax.training.start import objective_of
from lingbot_jax.training.state import init_state
from lingbot_jax.training.step import Program, make_step
from lingbot_jax.worlds.clips import Encoded
from lingbot_jax.worlds.condition import Camera, Conditioning
from lingbot_jax.worlds.world import template
from tests.training import micro

# Wide feed-forward layers: parameters outweigh activations, so a gradient buffer cannot hide among them.
NETWORK = dataclasses.replace(micro.NETWORK, ffn=16384, layers=1)
STEPS = 3
NULL = jnp.zeros((1, NETWORK.text_len, NETWORK.text_dim))


def batch() -> Encoded:
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.float32(rng.normal(size=(1, *shape)))
    video = (2, 2, 2)  # two tokens
    camera = Camera(jnp.tile(jnp.eye(4), (1, 2, 1, 1)), jnp.full((1, 1, 4), 8.0), make(2, 4))
    conditioning = Conditioning(make(*video, NETWORK.mask_channels), make(*video, NETWORK.latent_channels))
    text = make(NETWORK.text_len, NETWORK.text_dim)
    return Encoded(make(*video, NETWORK.latent_channels), text, camera, conditioning)


@functools.cache
def program(stage: str, rank: int = 0) -> tuple[Program, object]:
    """Each stage's step, and what it is compiled to."""
    fields = {"stage": stage, "world": micro.world_config(network=NETWORK), "curriculum": ()}
    fields |= {"lora": LoraConfig(rank=rank), "init": "unused"} if rank else {}
    config = micro.config(pathlib.Path("unused"), "run", **fields)
    mesh = make_mesh(micro.mesh(), jax.devices()[:1])
    objective = objective_of(config)
    made = make_step(objective, config, mesh, objective.updates(0), jax.eval_shape(batch))
    return made, made.lower().compile()


def nbytes(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def split(arrays: dict) -> tuple[dict, dict]:
    adapters = {path: leaf for path, leaf in arrays.items() if is_adapter(path)}
    return adapters, {path: leaf for path, leaf in arrays.items() if path not in adapters}


@pytest.mark.parametrize("which", [("action", 0), ("world", 1)])
def test_frozen_parameters_have_no_optimiser_state_and_no_gradient_buffers(which):
    state = program(*which)[0].args[0]
    own, rest = state.ema["world"], dict(state.params["world"])
    assert own.keys() == {path for path in rest if which[0] == "action" and is_adapter(path) or is_lora(path)}
    adapters, frozen = nbytes(own), nbytes({path: rest[path] for path in rest.keys() - own.keys()})
    assert 0 < adapters < 0.1 * frozen
    world, action = (program(*one)[1].memory_analysis() for one in (("world",), which))
    every = nbytes(program("world")[0].args[0].params)
    inputs = nbytes(batch()) + nbytes(NULL) + 1024  # and counters
    # Parameters, EMA and two moments of everything; three of the four of what trains only.
    assert 0 <= world.argument_size_in_bytes - 4 * every < inputs
    assert 0 <= action.argument_size_in_bytes - (4 * adapters + frozen) < inputs
    # The backward pass of stage world holds a gradient of every parameter, the other's does not.
    assert world.temp_size_in_bytes > every
    assert action.temp_size_in_bytes < 0.5 * frozen
    assert world.temp_size_in_bytes - action.temp_size_in_bytes > 0.9 * frozen


def test_frozen_parameters_stay_bit_identical_and_adapters_move():
    step = program("action")[0]
    rng = np.random.default_rng(1)
    # Random values everywhere: adapters begin at zero, where half of them have no gradient yet.
    shapes = params.arrays_of(template(NETWORK))
    before = {path: np.float32(0.1 * rng.normal(size=leaf.shape)) for path, leaf in shapes.items()}
    trains = lambda network, path: is_adapter(path)
    config = micro.config(
        pathlib.Path("unused"), "run", stage="action", world=micro.world_config(network=NETWORK)
    )
    state = init_state(config, {"world": jax.tree.map(jnp.asarray, before)}, trains, {"world": config.steps})
    for _ in range(STEPS):
        state, _ = step(state, batch(), Constants(NULL, None))
    adapters, frozen = split(state.params["world"])
    for path, leaf in frozen.items():
        same = np.asarray(leaf).view(np.uint32) == before[path].view(np.uint32)
        assert same.all(), path
    for path, leaf in adapters.items():
        assert (np.asarray(leaf) != before[path]).mean() > 0.9, path


@pytest.mark.parametrize("stage", ["world", "action"])
def test_every_stage_reports_rate_and_norm(stage):
    metrics = jax.tree.map(
        lambda s: s.shape, jax.eval_shape(program(stage)[0].fn, *program(stage)[0].args)[1]
    )
    assert {"loss", "loss_noisy", "grad_norm", "learning_rate"} <= metrics.keys()
