"""The real training step on eight devices equals one device: loss, gradients (moments) and parameters, float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.models.config import DiTConfig
from lingbot_jax.data.loader import LoaderConfig
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.dit import Condition
from lingbot_jax.parallel.mesh import MeshConfig, make_mesh
from lingbot_jax.parallel.multihost import global_batch
from lingbot_jax.training.config import OptimizerConfig, TrainConfig
from lingbot_jax.training.loop import fresh_state, make_step, place_state
from lingbot_jax.training.state import abstract_state, init_state
from lingbot_jax.training.step import Batch, make_train_step

MODEL = DiTConfig(
    dim=64,
    layers=2,
    heads=8,
    ffn=96,
    freq_dim=32,
    text_dim=24,
    text_len=4,
    latent_channels=4,
    spatial_stride=2,
    control="cam_act",
    dtype="float32",
    remat="full",
)
FRAMES, SIZE, BATCH = 3, 8, 8


def config(sizes=(1, -1, 1), **optimizer) -> TrainConfig:
    return TrainConfig(
        run="unused",
        stage="world",
        steps=10,
        model=MODEL,
        data=LoaderConfig("unused"),
        codec="unused",
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup=0, **optimizer),
        mesh=MeshConfig(*sizes),
    )


@functools.cache
def arrays():
    """Random parameters: freshly made ones hold zeros, behind which gradients vanish."""
    state = abstract_state(config())
    rng = np.random.default_rng(0)
    shapes = state.trainable | state.frozen
    return {path: np.float32(0.1 * rng.normal(size=leaf.shape)) for path, leaf in shapes.items()}


@functools.cache
def batch() -> Batch:
    rng = np.random.default_rng(1)
    make = lambda *shape: jnp.float32(rng.normal(size=(BATCH, *shape)))
    frames = (FRAMES, SIZE, SIZE)
    condition = Condition(
        text=make(MODEL.text_len, MODEL.text_dim),
        control=make(*frames, MODEL.control_channels),
        mask=make(*frames, MODEL.mask_channels),
        image=make(*frames, MODEL.latent_channels),
    )
    return Batch(make(*frames, MODEL.latent_channels), condition)


@functools.cache
def one_device(accumulate: int):
    chosen = config(accumulate=accumulate)
    return jax.jit(make_train_step(chosen, Attend()))(init_state(chosen, arrays()), batch())


@pytest.mark.parametrize(
    "sizes, accumulate", [((8, 1, 1), 1), ((1, 8, 1), 1), ((1, 1, 8), 1), ((2, 2, 2), 2)]
)
def test_step_equals_one_device(sizes, accumulate):
    chosen = config(sizes, accumulate=accumulate)
    mesh = make_mesh(chosen.mesh)
    placed = place_state(chosen, mesh)
    state = jax.device_put(init_state(chosen, arrays()), placed)
    state, metrics = make_step(chosen, mesh, placed)(state, global_batch(mesh, batch()))
    want, want_metrics = one_device(accumulate)
    np.testing.assert_allclose(metrics["loss"], want_metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], want_metrics["grad_norm"], rtol=1e-5)
    found = jax.tree_util.tree_leaves_with_path((state.optimizer, state.trainable, state.ema))
    wanted = jax.tree.leaves((want.optimizer, want.trainable, want.ema))
    for (path, got), wanted_leaf in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, wanted_leaf, atol=1e-5, rtol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_nothing_is_made_whole():
    """Fresh states of sharded runs hold 1/8 of every matrix and of its moments, and the same numbers."""
    chosen = dataclasses.replace(config((1, 4, 2)), seed=3)
    mesh = make_mesh(chosen.mesh)
    state = fresh_state(chosen, mesh, place_state(chosen, mesh))
    kernels = [path for path in state.trainable if path.endswith("kernel")]
    adam = state.optimizer[1][0]
    for tree in (state.trainable, state.ema, adam.mu, adam.nu):
        for path in kernels:
            assert tree[path].addressable_shards[0].data.size * 8 == tree[path].size, path
    whole = fresh_state(chosen, one := make_mesh(MeshConfig(), jax.devices()[:1]), place_state(chosen, one))
    for path in kernels:
        np.testing.assert_allclose(state.trainable[path], whole.trainable[path], atol=1e-6)
