"""The real training step on eight devices equals one device, gradient by gradient; a broken collective does not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.data.config import DataConfig
from lingbot_jax.models import params
from lingbot_jax.models.config import DiTConfig, LinearCodecConfig, NgramConfig
from lingbot_jax.parallel import sharding
from lingbot_jax.parallel.mesh import MeshConfig, make_mesh
from lingbot_jax.parallel.multihost import place_rows
from lingbot_jax.training import step as steps
from lingbot_jax.training.config import OptimizerConfig, TrainConfig
from lingbot_jax.training.objectives import Constants
from lingbot_jax.training.start import fresh_state, objective_of
from lingbot_jax.training.state import TrainState, abstract_state, init_state
from lingbot_jax.worlds.clips import Encoded
from lingbot_jax.worlds.condition import Camera, Conditioning
from lingbot_jax.worlds.config import WorldConfig
from lingbot_jax.worlds.world import template

NETWORK = DiTConfig(
    dim=64,
    layers=2,
    heads=8,
    ffn=96,
    freq_dim=32,
    text_dim=24,
    text_len=4,
    latent_channels=4,
    mask_channels=4,
    spatial_stride=2,
    control="cam_act",
    dtype="float32",
    remat="full",
)
WORLD = WorldConfig(
    networks={"world": NETWORK},
    codec=LinearCodecConfig(channels=4, strides=(4, 2, 2)),
    text=NgramConfig(dim=24, length=4),
)
FRAMES, SIZE, BATCH = 3, 8, 8
# Sums in another order: of a leaf's largest gradient. A gradient counted twice is off by 1.
TOLERANCE = 2e-4


def config(mesh: MeshConfig, parts: int = 1, **fields) -> TrainConfig:
    return TrainConfig(
        run="unused",
        stage="world",
        steps=10,
        world=WORLD,
        data=DataConfig(path="unused", batch=BATCH),
        codec="unused",
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup=0, grad_accum_steps=parts, clip=1e9),
        mesh=mesh,
        **fields,
    )


def axes(data: int, fsdp: int, seq: int) -> MeshConfig:
    return MeshConfig(data=data, fsdp=fsdp, seq=seq)


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    """Random parameters: freshly made ones hold zeros, behind which gradients vanish."""
    rng = np.random.default_rng(0)
    shapes = params.arrays_of(template(NETWORK))
    return {path: np.float32(0.1 * rng.normal(size=leaf.shape)) for path, leaf in shapes.items()}


@functools.cache
def batch() -> Encoded:
    rng = np.random.default_rng(1)
    make = lambda *shape: np.float32(rng.normal(size=(BATCH, *shape)))
    frames = (FRAMES, SIZE, SIZE)
    poses = np.tile(np.eye(4, dtype=np.float32), (BATCH, FRAMES, 1, 1))
    poses[:, :, :3, 3] = make(FRAMES, 3)
    camera = Camera(poses, np.full((BATCH, 1, 4), 8, np.float32), make(FRAMES, 4))
    conditioning = Conditioning(make(*frames, 4), make(*frames, 4))
    return Encoded(make(*frames, 4), make(4, 24), camera, conditioning)


def gradients(
    mesh: MeshConfig, parts: int = 1, devices: int = 8
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Raw gradients of the step's own function, and its metrics."""
    chosen = config(mesh, parts)
    made = make_mesh(chosen.mesh, jax.devices()[:devices])
    objective = objective_of(chosen)
    counts = {"world": 10}
    places = jax.tree.map(lambda s: s.sharding, abstract_state(chosen, made, objective.trains, counts))
    state = jax.device_put(init_state(chosen, {"world": arrays()}, objective.trains, counts), places)
    (update,) = objective.updates(0)
    constants = Constants(jnp.zeros((1, 4, 24)), None)
    attend = steps.Attend(kernel=steps.attention_kernel(made, NETWORK.heads))

    def run(state: TrainState, clips: Encoded):
        part = functools.partial(steps._gradients, chosen, objective, update, state, constants, attend)
        return steps._accumulated(part, clips, jax.random.key(0), parts)

    with jax.set_mesh(made):
        found, metrics = jax.jit(run)(state, place_rows(made, batch()))
    values = {name: float(mean.sum) / float(mean.count) for name, mean in metrics.items()}
    return jax.tree.map(np.asarray, found["world"]), values


@functools.cache
def one_device(parts: int):
    return gradients(axes(1, 1, 1), parts, devices=1)


def worst(mesh: MeshConfig, parts: int = 1) -> tuple[str, float]:
    """The leaf whose gradient is furthest off, relative to the leaf's largest."""
    found, metrics = gradients(mesh, parts)
    wanted, losses = one_device(parts)
    np.testing.assert_allclose(metrics["loss"], losses["loss"], rtol=1e-5)
    off = {path: np.abs(found[path] - g).max() / np.abs(g).max() for path, g in wanted.items()}
    assert found.keys() == wanted.keys() and all(np.abs(g).max() > 0 for g in wanted.values())
    path = max(off, key=off.get)
    return path, off[path]


WHOLE = MeshConfig(data=2, fsdp=2, seq=2, weights="whole")
MESHES = [(axes(1, 1, 8), 1), (axes(2, 2, 2), 2), (WHOLE, 1)]


@pytest.mark.parametrize(("mesh", "parts"), MESHES)
def test_gradients_equal_one_device(mesh, parts):
    path, off = worst(mesh, parts)
    assert off < TOLERANCE, path


def test_a_scatter_that_is_left_out_is_found(monkeypatch):
    """The gradient of a gathered matrix is summed over the devices that gathered it; here it is divided as well."""
    whole = jax.lax.all_gather

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
    def gather(x, axis, dim, tiled):
        return whole(x, axis, axis=dim, tiled=tiled)

    def forward(x, axis, dim, tiled):
        return gather(x, axis, dim, tiled), x.shape

    def backward(axis, dim, tiled, shape, g):
        index = jax.lax.axis_index(axis) * shape[dim]
        return (jax.lax.dynamic_slice_in_dim(g, index, shape[dim], dim),)  # no sum over the others

    gather.defvjp(forward, backward)
    monkeypatch.setattr(jax.lax, "all_gather", lambda x, name, *, axis, tiled: gather(x, name, axis, tiled))
    path, off = worst(axes(1, 8, 1))
    assert off > 100 * TOLERANCE, (path, off)


def test_an_exchange_that_scales_one_head_is_found(monkeypatch):
    """An all-to-all of Ulysses whose gradient is doubled for queries and keys."""
    whole = jax.lax.all_to_all

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def doubled(x, call):
        return call(x)

    doubled.defvjp(lambda x, call: (call(x), x), lambda call, x, g: (2 * jax.vjp(call, x)[1](g)[0],))

    def exchange(x, axis, split, concat, **options):
        call = lambda y: whole(y, axis, split, concat, **options)
        return doubled(x, call) if split == 3 else call(x)

    monkeypatch.setattr(jax.lax, "all_to_all", exchange)
    path, off = worst(axes(1, 1, 8))
    assert off > 100 * TOLERANCE, (path, off)


def test_the_whole_step_equals_one_device():
    """Parameters, averages and moments after one update, by each leaf's own change."""
    results = []
    for mesh, devices in ((axes(1, 1, 1), 1), (axes(2, 2, 2), 8)):
        chosen = config(mesh)
        made = make_mesh(chosen.mesh, jax.devices()[:devices])
        objective = objective_of(chosen)
        counts = {"world": 10}
        places = jax.tree.map(lambda s: s.sharding, abstract_state(chosen, made, objective.trains, counts))
        state = jax.device_put(init_state(chosen, {"world": arrays()}, objective.trains, counts), places)
        program = steps.make_step(objective, chosen, made, objective.updates(0))
        state, _ = program(state, place_rows(made, batch()), Constants(jnp.zeros((1, 4, 24)), None))
        results.append(state)
    one, eight = results
    for name in ("opt", "ema"):
        found = jax.tree_util.tree_leaves_with_path(getattr(eight, name))
        for (path, got), want in zip(found, jax.tree.leaves(getattr(one, name)), strict=True):
            scale = max(np.abs(want).max(), 1e-30)
            off = np.abs(np.asarray(got) - np.asarray(want)).max() / scale
            assert off < 10 * TOLERANCE, jax.tree_util.keystr(path)


def test_nothing_is_made_whole():
    """Fresh states of sharded runs hold 1/8 of every matrix and of its moments, and the same numbers."""
    chosen = dataclasses.replace(config(axes(1, 4, 2)), seed=3)
    mesh = make_mesh(chosen.mesh)
    objective = objective_of(chosen)
    random = dataclasses.replace(chosen, init=None)
    state = fresh_state(random, mesh, objective)
    arrays = state.params["world"]
    kernels = [path for path in arrays if path.endswith("kernel")]
    adam = state.opt["world"][1][0]
    for tree in (arrays, state.ema["world"], adam.mu, adam.nu):
        for path in kernels:
            assert tree[path].addressable_shards[0].data.size * 8 == tree[path].size, path
    whole = fresh_state(random, make_mesh(axes(1, 1, 1), jax.devices()[:1]), objective)
    for path in kernels:
        np.testing.assert_allclose(arrays[path], whole.params["world"][path], atol=1e-6)


def test_bytes_per_device_are_those_of_the_shardings():
    chosen = config(axes(1, 4, 2))
    state = abstract_state(chosen, make_mesh(chosen.mesh), objective_of(chosen).trains, {"world": 10})
    matrices = sum(
        int(np.prod(s.shape)) * 4 for p, s in state.params["world"].items() if p.endswith("kernel")
    )
    assert sharding.count_bytes(state.params) < 0.2 * matrices
