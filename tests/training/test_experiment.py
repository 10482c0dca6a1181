"""The command: errors of one line and exit codes. Where parameters come from. Two experts as one world."""

import dataclasses
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.models import params
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.parallel.mesh import make_mesh
from lingbot_jax.training import curriculum
from lingbot_jax.training.start import fresh_state, objective_of, read_origins, resolve
from lingbot_jax.training.state import TrainState, abstract_state
from lingbot_jax.worlds import storage
from lingbot_jax.worlds.checkpoints import Checkpoints
from lingbot_jax.worlds.config import WorldConfig
from lingbot_jax.worlds.open import params_folder, write_bundle_config
from lingbot_jax.worlds.world import template
from tests.training import micro

pytestmark = pytest.mark.long


def one_device():
    return make_mesh(micro.mesh(), jax.devices()[:1])


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--config.data.frames=12"], "error: --config.data.frames = 12: must be 4n + 1"),
        (["--config.nonsense=1"], "error: --config.nonsense=1: unknown field"),
        (["--config.seed=-1"], "error: --config.seed = -1: must be greater than or equal to 0"),
        (["--config.codec=nowhere"], "error: --config.codec = 'nowhere': neither a run"),
    ],
)
def test_command_ends_with_one_line_and_exit_code_2(folder, flags, line):
    command = [*micro.command(micro.config(folder, "bad", curriculum=())), *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=micro.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(line)
    assert "Traceback" not in done.stderr
    assert not (folder / "bad").exists(), "nothing is written for a bad config"


def restored(config) -> TrainState:
    objective = objective_of(config)
    counts = {name: objective.update_count(name) for name in config.world.networks}
    wanted = abstract_state(config, one_device(), objective.trains, counts)
    return TrainState(**Checkpoints(config.run, read_only=True).restore(vars(wanted)))


def test_a_run_of_two_experts_is_one_world(whole):
    world, state = micro.opened(whole), restored(whole)
    assert world.config.boundary == whole.world.boundary and set(world.networks) == {"high", "low"}
    for name, network in world.networks.items():
        ours, theirs = params.arrays_of(network), state.ema[name]
        assert ours.keys() == theirs.keys()
        assert all((np.asarray(ours[path]) == np.asarray(theirs[path])).all() for path in ours)
    counts = {name: int(state.opt[name][1][0].count) for name in ("high", "low")}
    assert counts == {name: curriculum.update_count(whole, name) for name in counts}
    assert min(counts.values()) > 0 and sum(counts.values()) == whole.steps


def test_a_step_of_one_network_leaves_the_other_alone(whole):
    state = restored(whole)
    part = state.part(["high"])
    assert set(part.params) == set(part.ema) == set(part.opt) == {"high"}
    after = state.updated(jax.tree.map(lambda x: x + 1, part))
    same = lambda a, b: all(
        (np.asarray(x) == y).all() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )
    assert same(after.params["low"], state.params["low"]) and same(after.opt["low"], state.opt["low"])
    assert same(after.params["high"], jax.tree.map(lambda x: x + 1, state.params["high"]))
    assert int(after.step) == int(state.step) + 1


def write_bundle(folder: pathlib.Path, *names: str, network: DiTConfig = micro.NETWORK) -> dict[str, dict]:
    """A converted bundle of transformers without adapters, stored in bfloat16."""
    network = dataclasses.replace(network, control="none")
    rng, stored = np.random.default_rng(0), {}
    folder.mkdir()
    for name in names:
        shapes = params.arrays_of(template(network))
        stored[name] = {p: jnp.asarray(rng.normal(size=s.shape), jnp.bfloat16) for p, s in shapes.items()}
        storage.write(params_folder(folder, name), stored[name])
    write_bundle_config(folder, WorldConfig(networks=dict.fromkeys(names, network)))
    return stored


def test_parameters_come_from_a_bundle_in_float32_and_adapters_start_fresh(folder, tmp_path):
    stored = write_bundle(tmp_path / "bundle", "high", "low")
    world = micro.world_config("high", "low", boundary=0.9)
    config = resolve(micro.config(folder, "unused", init=str(tmp_path / "bundle"), world=world))
    state = fresh_state(config, one_device(), objective_of(config))
    for name, arrays in stored.items():
        for path, value in arrays.items():
            assert state.params[name][path].dtype == jnp.float32
            np.testing.assert_array_equal(state.params[name][path], value.astype(np.float32), err_msg=path)
        assert state.params[name].keys() - arrays.keys(), "adapters start fresh"


def test_every_network_has_one_origin_of_its_name(folder, tmp_path):
    """N3: the high-noise expert never starts the low-noise one by mistake."""
    for names in (("high", "low"), ("world",), ("high",)):
        write_bundle(tmp_path / "-".join(names), *names)
    at = lambda name: str(tmp_path / name)

    def origins(init: str, *names: str) -> dict[str, tuple[str, str]]:
        config = micro.config(folder, "unused", init=init, world=micro.world_config(*names))
        return {n: (o.source.path.name, o.name) for n, o in read_origins(config).items()}

    both = {"high": ("high-low", "high"), "low": ("high-low", "low")}
    assert origins(at("high-low"), "high", "low") == both
    assert origins(at("high-low"), "low") == {"low": ("high-low", "low")}
    assert origins(at("world"), "high", "low") == {"high": ("world", "world"), "low": ("world", "world")}
    named = f"high={at('high')},low={at('world')}"
    assert origins(named, "high", "low") == {"high": ("high", "high"), "low": ("world", "world")}
    assert origins(f"low={at('high')}#high", "low") == {"low": ("high", "high")}
    for init, names, line in (
        (at("high"), ("low",), "has high, not 'low'; another network may start low if it is named: low="),
        (at("high-low"), ("world",), "has high and low, not 'world'"),
        (at("high"), ("high", "low"), "has high, not 'low'"),
        (f"high={at('high')}", ("high", "low"), "nothing starts low"),
        (
            f"{at('high')},{at('world')}",
            ("high", "low"),
            "must be a run or bundle, or NAME=SOURCE,NAME=SOURCE",
        ),
        ("nowhere", ("world",), "config.init = 'nowhere': neither a run"),
    ):
        with pytest.raises(ConfigError, match="^[^\n]+$") as error:
            origins(init, *names)
        assert line in str(error.value)


def test_another_model_is_refused_by_the_parameter(folder, tmp_path):
    write_bundle(tmp_path / "wide", "world", network=dataclasses.replace(micro.NETWORK, ffn=64))
    config = micro.config(folder, "unused", init=str(tmp_path / "wide"))
    with pytest.raises(
        ConfigError,
        match=r"its parameter blocks.ffn.\S* has another shape; use the same sizes in config.world.networks.world",
    ):
        fresh_state(resolve(config), one_device(), objective_of(config))


def test_action_stage_leaves_everything_but_adapters_of_its_init_bit_for_bit(whole):
    """Two experts again, from the averaged parameters of the run before."""
    config = dataclasses.replace(
        whole, run=f"{whole.run}-action", stage="action", steps=2, init=whole.run, curriculum=()
    )
    micro.train(config)
    for name in ("high", "low"):
        before, after = (params.arrays_of(micro.opened(c).networks[name]) for c in (whole, config))
        moved = {path for path in before if (np.asarray(before[path]) != np.asarray(after[path])).any()}
        assert all("control" in path.split(".") for path in moved)
    assert restored(config).ema["high"].keys() == {p for p in before if "control" in p.split(".")}
