"""The real step, small, compiled by the real TPU compiler: what it sends, holds and counts."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

pytest.importorskip("libtpu", reason="no libtpu")

import experiments.plan  # noqa: E402
from experiments.common import UserError  # noqa: E402
from experiments.plan import candidates, chosen_phase, describe, plan, step_state, topology_devices  # noqa: E402
from lingbot_jax.config import ConfigError, DiTConfig  # noqa: E402
from lingbot_jax.data.loader import LoaderConfig  # noqa: E402
from lingbot_jax.models import dit, layers  # noqa: E402
from lingbot_jax.parallel.mesh import BATCH_AXES, MeshConfig, make_mesh  # noqa: E402
from lingbot_jax.training.config import Phase, TrainConfig  # noqa: E402

SMALL = TrainConfig(
    run="unused",
    stage="world",
    steps=10,
    codec="unused",
    model=DiTConfig(
        dim=512, layers=2, heads=4, ffn=1024, text_dim=64, text_len=48, control="none", remat="full"
    ),
    data=LoaderConfig("unused", frames=9, batch=1),
    # 320 tokens a frame: with 256, 3 frames would make 768, a divisor of the time projection's 6 x 512 columns.
    size=(256, 320),
    mesh=MeshConfig(1, -1, 4),
)
WHERE = {"topology": "v5p:2x2x2", "tokens": 1e9}
PROMISED = "fits hbm_bytes_per_chip hbm_limit_bytes step_seconds_roofline bound_by mfu tokens_per_second "
PROMISED += "collective_bytes"


@pytest.fixture(scope="module")
def report():
    """Of two slices, so that every axis of the mesh has something to do."""
    return plan(dataclasses.replace(SMALL, mesh=MeshConfig(2, -1, 4)), **WHERE, slices=2)


def test_it_sends_and_holds_what_it_should(report):
    kinds, meant = report["collective_bytes"], report["collective_bytes_intended"]
    assert report["faults"] == []
    assert set(kinds["all-to-all"]) == {"seq"}
    assert [kind for kind, row in kinds.items() if "data" in row] == ["all-reduce"]
    # Between slices: what is left of each gradient after two scatters, in at most float32.
    held = report["hbm_bytes_per_chip"]["parameters"]
    assert 0.4 * held < kinds["all-reduce"]["data"] < 1.2 * held
    for kind in ("all-gather", "reduce-scatter"):  # no fault is no proof if nothing was counted
        assert sum(kinds[kind].values()) > 0.6 * sum(meant[kind].values())


def test_state_is_split_over_all_devices(report):
    held = report["hbm_bytes_per_chip"]
    weights = report["flops"]["forward_of_a_sample"]["tokens"] / 2 / 3 / 320  # weights that meet every token
    assert 4 * weights / 8 < held["parameters"] < 1.8 * 4 * weights / 8
    assert held["optimizer"] == pytest.approx(2 * held["parameters"], rel=0.01)
    assert report["fits"] and held["total"] < report["hbm_limit_bytes"]
    assert (
        held["activations"] >= 2 * 3 * 320 // 4 * 512 * 2
    )  # layers, frames, tokens of a device, width, bf16
    # Donated: new parameters, average and moments take the place of the old ones.
    once = sum(held[name] for name in ("parameters", "ema", "optimizer", "batch"))
    work = sum(held[name] for name in ("activations", "temporaries", "program"))
    assert once + work < held["total"] < 1.1 * once + work


def test_counted_flops_agree_with_the_analytic_ones(report):
    flops = report["flops"]
    assert flops["attention_forward_passes"] == 2  # one more in the backward pass
    assert flops["matmul_per_chip_hlo"] == pytest.approx(flops["matmul_per_chip_analytic"], rel=0.15)


def test_the_report_has_the_promised_fields(report):
    assert set(PROMISED.split()) <= set(json.loads(json.dumps(report)))
    assert 0 < report["mfu_without_overlap"] <= report["mfu"] < 1
    assert "chip-hours" in describe(report)


def test_wrong_implementations_are_found(monkeypatch):
    """Tokens gathered over seq, gradients summed whole, moments replicated: all in one program."""
    place = experiments.plan.place_state

    def replicated(config, mesh):
        placed = place(config, mesh)
        whole = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), placed.optimizer)
        return dataclasses.replace(placed, optimizer=whole)

    gathered = lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))
    weights = lambda x, kernel: x @ kernel[...].astype(x.dtype)  # as the compiler likes
    monkeypatch.setattr(experiments.plan, "place_state", replicated)
    monkeypatch.setattr(dit, "constrain_tokens", gathered)
    monkeypatch.setattr(layers, "linear", weights)
    report = plan(SMALL, **WHERE)
    found = "\n".join(report["faults"])
    assert "the tokens of whole samples" in found
    assert "a whole gradient, not scattered" in found
    assert "optimizer: " in found
    assert "FAULT: " in describe(report)


def test_what_does_not_fit_has_all_fields_too():
    large = dataclasses.replace(
        SMALL,
        model=dataclasses.replace(SMALL.model, dim=8192, heads=64, ffn=32768, layers=64),
        data=dataclasses.replace(SMALL.data, batch=8),
    )
    report = plan(large, **WHERE | {"topology": "v5e:2x4"})
    assert not report["fits"] and set(PROMISED.split()) <= set(json.loads(json.dumps(report)))
    assert report["mfu"] is None and report["hbm_bytes_per_chip"]["total"] > report["hbm_limit_bytes"]
    assert "DOES NOT FIT" in describe(report)


def test_phases_are_planned_by_their_number():
    phases = (Phase(5, frames=5), Phase(10, frames=9, batch=2, mesh=MeshConfig(1, -1, 2)))
    run = dataclasses.replace(SMALL, curriculum=phases)
    assert chosen_phase(run, None) == run
    chosen = chosen_phase(run, 1)
    assert (chosen.data.frames, chosen.data.batch, chosen.mesh.seq) == (9, 2, 2)
    with pytest.raises(UserError, match=r"--phase=2: the config has curriculum\[0\] to \[1\]"):
        chosen_phase(run, 2)
    with pytest.raises(UserError, match="--phase=0: the config has no curriculum"):
        chosen_phase(SMALL, 0)


def test_of_two_experts_one_is_stepped_and_both_are_held():
    mesh = make_mesh(SMALL.mesh, topology_devices("v5p:2x2x2"))
    one, other, *_ = step_state(SMALL, mesh)
    assert other == 0
    held, other, state, placed, alone = step_state(dataclasses.replace(SMALL, expert="both"), mesh)
    assert held["parameters"] == 2 * one["parameters"] and held["ema"] == 2 * one["ema"]
    assert other == pytest.approx(sum(one.values()), rel=0.001)
    assert alone.expert == "high" and "blocks.ffn.up.kernel" in state.trainable
    assert jax.tree.structure(state) == jax.tree.structure(placed)


def test_candidates_divide_the_mesh():
    found = candidates(SMALL, "v5p:2x2x2", 1, None, None)
    assert len(found) > 4 and len(set(found)) == len(found)
    for candidate in found:
        rows, parts = 8 // candidate.mesh.seq, min(8 // candidate.mesh.seq, 2)
        assert candidate.data.batch * parts % (rows * candidate.optimizer.accumulate) == 0
    assert {candidate.mesh.seq for candidate in found} == {1, 2, 4, 8}


def test_slices_are_joined_along_data_only():
    mesh = make_mesh(MeshConfig(2, -1, 4), topology_devices("v5e:2x4", slices=2))
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "seq": 4}
    assert (slices == slices[:, :1, :1]).all() and len(set(slices[:, 0, 0])) == 2
    with pytest.raises(ConfigError, match="mesh.data = 1: must be a multiple of 2 slices"):
        make_mesh(MeshConfig(1, -1, 4), topology_devices("v5e:2x4", slices=2))


@pytest.mark.parametrize(
    "changed, where, words",
    [
        ({"mesh": MeshConfig(1, -1, 3)}, {}, "product 3 must divide the 8 devices"),
        (
            {"mesh": MeshConfig(1, -1, 2)},
            {},
            r"data.batch = 1: a microstep of 2 clips must divide over .* = 4",
        ),
        ({"size": (0, 0)}, {}, "--height=0: the config has no size; give a multiple of 16 pixels"),
        ({}, {"width": 100}, "--width=100: give a multiple of 16 pixels"),
        ({}, {"topology": "v99:2x2"}, "generation 'v99' is not one of v5e, v5p, v6e, tpu7x"),
        ({}, {"topology": "v5p:2x2x3"}, "512 does not divide over fsdp x seq = 12 devices"),
        ({}, {"slices": 2}, "mesh.data = 1: must be a multiple of 2 slices"),
    ],
)
def test_refusals_are_one_line(changed, where, words):
    with pytest.raises((ConfigError, UserError), match=words):
        plan(dataclasses.replace(SMALL, **changed), **WHERE | where)


def test_a_wrong_topology_is_one_line_and_exit_code_2():
    command = [sys.executable, "-m", "experiments.plan", "--config=experiments/configs/w14b.py:world"]
    done = subprocess.run([*command, "--topology=v5p:banana"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: --topology=v5p:banana: ")
