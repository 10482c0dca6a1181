"""Low-rank adapters: nothing changes until they have learnt, nothing else trains, and whoever opens the run sees one
matrix in the place of three."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from safetensors.numpy import load_file

from lingbot_jax.config import ConfigError
from lingbot_jax.convert import contents, names_dit
from lingbot_jax.convert.lora import to_lora
from lingbot_jax.models import params
from lingbot_jax.models.control import is_adapter
from lingbot_jax.models.dit import Condition, WorldDiT
from lingbot_jax.models.lora import LoraConfig, adapted, is_lora
from lingbot_jax.training.config import CheckpointConfig
from lingbot_jax.training.loop import train
from lingbot_jax.training.start import objective_of
from lingbot_jax.training.state import abstract_state
from lingbot_jax.worlds.open import find
from lingbot_jax.worlds.world import template
from tests.training import micro

LORA = LoraConfig(rank=2, alpha=6.0)


@pytest.fixture(scope="module")
def config(folder, whole):
    """A run of two steps that starts as a trained network, its camera adapters included."""
    return micro.config(
        folder,
        "lora",
        steps=2,
        curriculum=(),
        lora=LORA,
        init=f"world={whole.run}#high",
        checkpoint=CheckpointConfig(every=2, every_minutes=None),
    )


@pytest.fixture(scope="module")
def state(config):
    return jax.tree.map(np.asarray, train(config))


@jax.jit
def run(model: WorldDiT) -> jax.Array:
    """Velocity of made-up latents under made-up conditions."""
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), (1, 2, *shape))
    size, own = (4, 4), model.config
    text = draw(1, own.text_len, own.text_dim)[:, 0]
    condition = Condition(text, draw(2, *size, own.control_channels), draw(3, *size, 4), draw(4, *size, 8))
    return model(draw(5, *size, 8), jnp.full((1, 2), 700.0), condition)


def test_fresh_adapters_change_no_bit():
    """In whatever network: a fresh one's output is zero."""
    rng, plain = np.random.default_rng(0), template(micro.NETWORK)
    some = {p: jnp.float32(rng.normal(0.1, 0.1, leaf.shape)) for p, leaf in params.arrays_of(plain).items()}
    fresh = jax.jit(lambda key: params.arrays_of(adapted(micro.NETWORK, LORA, key)))(jax.random.key(0))
    low = {path: leaf for path, leaf in fresh.items() if is_lora(path)}
    assert fresh.keys() == {*some, *low}
    assert all((np.abs(leaf).max() > 0) == path.endswith("a_kernel") for path, leaf in low.items())
    velocity = run(params.with_arrays(plain, some))
    assert np.abs(velocity).max() > 0
    again = run(params.with_arrays(template(micro.NETWORK, LORA), some | low))
    np.testing.assert_array_equal(again, velocity)


def test_only_adapters_move_and_have_moments(config, state, whole):
    wanted = params.arrays_of(template(micro.NETWORK))
    before = find(whole.run).read("high", wanted)
    after, own = state.params["world"], state.ema["world"].keys()
    assert own == {path for path in after if is_lora(path)} and len(own) == 2 * len(LORA.linears)
    moments = jax.tree_util.tree_leaves_with_path(state.opt["world"])
    named = [key for path, _ in moments for key in (getattr(p, "key", None) for p in path) if key]
    assert sorted(named) == sorted([*own, *own])
    for path in wanted:
        np.testing.assert_array_equal(after[path], before[path], err_msg=path)
    assert all(np.abs(after[path]).max() > 0 for path in own)  # B begins at zero


def test_a_resumed_run_has_them(config, state):
    again = jax.tree.map(np.asarray, train(config))  # nothing is left to do
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_whoever_opens_the_run_sees_them_merged(config, state):
    world = micro.opened(config)
    assert world.config.networks == {"world": micro.NETWORK}
    made = params.arrays_of(world.networks["world"])
    own = jax.tree.map(jnp.asarray, state.params["world"] | state.ema["world"])
    assert made.keys() == {path for path in own if not is_lora(path)}
    for path, leaf in made.items():
        expected = own[path]
        if path.endswith("kernel") and (a := path.replace("kernel", "lora.a_kernel")) in own:
            b = a.replace("a_kernel", "b_kernel")
            expected = expected + 3.0 * (np.float64(own[a]) @ np.float64(own[b]))
            assert np.abs(expected - own[path]).max() > 1e-4
        np.testing.assert_allclose(leaf, expected, rtol=1e-6, atol=1e-7, err_msg=path)
    apart = params.with_arrays(template(micro.NETWORK, LORA), own)
    merged, apart = run(world.networks["world"]), run(apart)
    np.testing.assert_allclose(merged, apart, atol=1e-5 * np.abs(apart).max())
    base = run(params.with_arrays(template(micro.NETWORK), {path: own[path] for path in made}))
    assert np.abs(base - apart).max() > 1e-4 * np.abs(apart).max()


def test_the_run_is_exported_merged_and_alone(config, state, whole, tmp_path):
    """For every layer of every adapted matrix: what is added to it has in the export the published layout."""
    wanted = params.arrays_of(template(micro.NETWORK))
    base, merged = find(whole.run).read("high", wanted), find(config.run).read("world", wanted)
    (part,) = (p for p in contents.look(config.run).parts if p.name == "world")
    read = part.open()
    for path, layer in part.units():
        leaf = merged[path] if layer is None else merged[path][layer]
        np.testing.assert_array_equal(read(path, layer), leaf, err_msg=path)
    to_lora(config.run, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "world.safetensors")
    assert len(tensors) == 2 * micro.NETWORK.layers * len(LORA.linears)
    ours = {e.ours: e for e in names_dit.dit_table(micro.NETWORK)}
    for entry in names_dit.lora_table(micro.NETWORK, LORA)[::2]:
        path = entry.ours.replace("lora.a_kernel", "kernel")
        for layer in range(micro.NETWORK.layers):
            name = entry.published.format(n=layer)
            b = np.float64(tensors[name.replace("lora_A", "lora_B")])
            (added,) = ours[path].to_published(np.asarray(merged[path] - base[path])[layer])
            np.testing.assert_allclose(b @ tensors[name], added, atol=1e-6, err_msg=name)
    with pytest.raises(ConfigError, match="has no low-rank adapters"):
        to_lora(whole.run, tmp_path / "none")


def test_factors_and_moments_are_split_by_the_table(config):
    mesh = AbstractMesh((1, 4, 2), ("data", "fsdp", "seq"))
    placed = abstract_state(config, mesh, objective_of(config).trains, {"world": 2})
    wide = ("fsdp", "seq")
    expected = {"a_kernel": PartitionSpec(None, wide, None), "b_kernel": PartitionSpec(None, None, wide)}
    found = [
        (path[-1].key, leaf.sharding.spec)
        for path, leaf in jax.tree_util.tree_leaves_with_path((placed.params, placed.ema, placed.opt))
        if "lora" in str(path[-1])
    ]
    assert len(found) == 4 * 2 * len(LORA.linears)
    assert all(spec == expected[name.rpartition(".")[2]] for name, spec in found)


def test_what_trains_by_stage(folder):
    world = micro.world_config(causal=micro.CAUSAL)
    made = lambda stage: micro.config(
        folder, "unused", stage=stage, world=world, init="unused", teacher="unused", curriculum=(), lora=LORA,
        tasks=dataclasses.replace(micro.config(folder, "unused").tasks, continuation=0.0),
    )  # fmt: skip
    paths = params.arrays_of(template(micro.NETWORK, LORA))
    trained = {
        stage: {path for path in paths if objective_of(made(stage)).trains("world", path)}
        for stage in ("world", "action", "causal", "distill")
    }
    low = {path for path in paths if is_lora(path)}
    assert trained == {
        "world": low,
        "action": {path for path in paths if is_adapter(path)},
        "causal": low,
        "distill": low,
    }
    assert low < trained["action"] and len(low) == 2 * len(LORA.linears)
    objective = objective_of(made("distill"))
    assert objective.trains("fake", "blocks.ffn.up.kernel") and objective.trains("head", "any")


def test_refusals(folder):
    with pytest.raises(ConfigError, match=r"lora.rank = 2: adapts what is there already"):
        micro.config(folder, "unused", lora=LORA)
    with pytest.raises(ConfigError, match=r"alpha = 2.0: means nothing without rank"):
        LoraConfig(alpha=2.0)
    with pytest.raises(ConfigError, match=r"linears = .*: must name one or more layers, each once"):
        LoraConfig(linears=("ffn.up", "ffn.up"))
