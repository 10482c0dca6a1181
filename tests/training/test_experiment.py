"""The command: errors of one line and exit codes. Parameters from runs and bundles. Two experts as one world."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.train import read_init
from lingbot_jax.config import ConfigError
from lingbot_jax.models import params
from lingbot_jax.models.dit import WorldDiT
from lingbot_jax.models.experts import NoiseExperts
from lingbot_jax.parallel.mesh import MeshConfig, make_mesh
from lingbot_jax.serve import bundle
from lingbot_jax.training import curriculum
from lingbot_jax.training.checkpoints import Checkpoints, load_ema
from lingbot_jax.training.config import FlowConfig
from lingbot_jax.training.loop import check_init, fresh_state, place_state, start_arrays
from lingbot_jax.training.state import abstract_model, abstract_state, flatten, merge, put_expert, take_expert
from tests.training import micro


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--config.data.frames=12"], "error: data.frames = 12: must be 4n+1"),
        (["--config.nonsense=1"], "error: config.nonsense=1: unknown field"),
    ],
)
def test_command_ends_with_one_line_and_exit_code_2(folder, flags, line):
    command = [
        sys.executable,
        "-m",
        "experiments.train",
        "--config=experiments/configs/tiny.py:world",
        *flags,
    ]
    command += [f"--config.run={folder / 'bad'}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=micro.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(line)
    assert "Traceback" not in done.stderr
    assert not (folder / "bad").exists(), "nothing is written for a bad config"


def test_a_run_of_two_experts_is_one_world(whole):
    model = merge(abstract_model(whole), load_ema(whole.run))
    assert isinstance(model, NoiseExperts) and model.boundary == whole.flow.boundary
    state, _ = Checkpoints(whole.run, whole.checkpoint, read_only=True).restore(abstract_state(whole))
    for expert in ("high", "low"):
        ours, theirs = flatten(model.select(expert)), take_expert(state, expert).ema
        assert ours.keys() == theirs.keys()
        assert all((np.asarray(ours[path]) == np.asarray(theirs[path])).all() for path in ours)
    counts = {e: int(state.optimizer[e][1][0].count) for e in ("high", "low")}
    assert counts == {e: curriculum.expert_steps(whole, e) for e in ("high", "low")}
    assert min(counts.values()) > 0 and sum(counts.values()) == whole.steps


def test_a_step_of_one_expert_leaves_the_other_alone(whole):
    state, _ = Checkpoints(whole.run, whole.checkpoint, read_only=True).restore(abstract_state(whole))
    part = take_expert(state, "high")
    changed = jax.tree.map(lambda x: x + 1, part)
    after = put_expert(state, "high", changed)
    same = lambda a, b: all(
        (np.asarray(x) == np.asarray(y)).all() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )
    assert same(take_expert(after, "high"), changed)
    low = dataclasses.replace(take_expert(after, "low"), step=state.step)
    assert same(low, take_expert(state, "low")) and int(after.step) == int(state.step) + 1


def sources(config):
    rng = np.random.default_rng(0)
    one = dataclasses.replace(config, expert="single")
    state = abstract_state(one)
    return {
        path: jnp.float32(rng.normal(size=a.shape)) for path, a in (state.trainable | state.frozen).items()
    }


def test_where_parameters_come_from(folder):
    config = micro.config(folder, "unused", init="a")
    one = sources(config)
    two = {f"{e}.{path}": leaf + (e == "low") for e in ("high", "low") for path, leaf in one.items()}
    expert = lambda name, **fields: dataclasses.replace(config, expert=name, **fields)
    assert start_arrays(expert("single"), [one]) == start_arrays(expert("high"), [one]) == one
    low = start_arrays(expert("low"), [two])
    assert low.keys() == one.keys() and all((low[path] == one[path] + 1).all() for path in one)
    assert start_arrays(expert("both"), [two]) == two
    both = start_arrays(expert("both"), [one])
    assert all(both[f"high.{path}"] is both[f"low.{path}"] is one[path] for path in one)
    pair = start_arrays(expert("both", init="a,b"), [one, low])
    assert pair.keys() == two.keys() and all((pair[path] == two[path]).all() for path in two)
    with pytest.raises(ConfigError, match="^init = 'a': has two experts; set expert to high, low or both$"):
        start_arrays(expert("single"), [two])
    with pytest.raises(ConfigError, match="^init = 'a,b': two sources"):
        start_arrays(expert("high", init="a,b"), [one, one])

    without = {path: leaf for path, leaf in one.items() if "control" not in path.split(".")}
    check_init(config, without)  # adapters start fresh
    with pytest.raises(ConfigError, match="^init = 'a': has no parameter head.*; use the same model$"):
        check_init(config, {path: leaf for path, leaf in one.items() if not path.startswith("head.")})
    for wrong in ({path: leaf[..., :1] for path, leaf in one.items()}, one | {"unknown": jnp.zeros(2)}):
        with pytest.raises(ConfigError, match="does not fit model; use the same sizes$"):
            check_init(config, wrong)


def write_bundle(folder: pathlib.Path, names: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """A converted bundle of transformers without adapters, stored in bfloat16."""
    model = dataclasses.replace(micro.MODEL, control="none")
    specs = params.flat_params(params.abstract(lambda key: WorldDiT(model, key)))
    specs = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) for path, leaf in specs.items()}
    rng, stored = np.random.default_rng(0), {}
    folder.mkdir()
    for name in names:
        stored[name] = {path: rng.normal(size=s.shape).astype(s.dtype) for path, s in specs.items()}
        writer = bundle.ParamsWriter(bundle.params_folder(folder, name), specs)
        for path, value in stored[name].items():
            writer.write(path, None, value)
    bundle.write_manifest(folder, bundle.Manifest(world=dict.fromkeys(names, model)))
    return stored


def test_parameters_come_from_a_converted_bundle_in_float32(folder):
    path = folder / "bundle"
    stored = write_bundle(path, ["high", "low"])
    mesh = make_mesh(MeshConfig())
    config = micro.config(folder, "unused", init=str(path), expert="both", flow=FlowConfig(boundary=0.9))
    state = fresh_state(config, mesh, place_state(config, mesh), read_init)
    for expert, arrays in stored.items():
        trainable = take_expert(state, expert).trainable
        for name, value in arrays.items():
            assert trainable[name].dtype == jnp.float32
            np.testing.assert_array_equal(trainable[name], value.astype(np.float32), err_msg=name)
        assert trainable.keys() - arrays.keys(), "adapters start fresh"
    low = read_init(str(path), dataclasses.replace(config, expert="low"), mesh)
    assert low.keys() == stored["low"].keys()
    assert all(
        (np.asarray(low[name]) == value.astype(np.float32)).all() for name, value in stored["low"].items()
    )
    with pytest.raises(
        ConfigError, match="the bundle has high, low, expert = single needs world; choose another"
    ):
        read_init(str(path), dataclasses.replace(config, expert="single"), mesh)


def test_action_stage_leaves_everything_but_adapters_of_its_init_bit_for_bit(whole):
    """Two experts again, from the averaged parameters of the run before."""
    config = dataclasses.replace(
        whole, run=f"{whole.run}-action", stage="action", steps=2, init=whole.run, curriculum=()
    )
    micro.train(config)
    before, after = load_ema(whole.run), load_ema(config.run)
    moved = {path for path in before if (np.asarray(before[path]) != np.asarray(after[path])).any()}
    assert moved and all("control" in path.split(".") for path in moved)
