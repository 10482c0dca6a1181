"""The real step, small, compiled by the real TPU compiler: what it sends, holds and counts."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("libtpu", reason="no libtpu")

from experiments.plan import describe, plan, topology_devices  # noqa: E402
from lingbot_jax.config import ConfigError, DiTConfig  # noqa: E402
from lingbot_jax.data.loader import LoaderConfig  # noqa: E402
from lingbot_jax.parallel.mesh import MeshConfig, make_mesh  # noqa: E402
from lingbot_jax.training.config import TrainConfig  # noqa: E402

SMALL = TrainConfig(
    run="unused",
    stage="world",
    steps=10,
    codec="unused",
    model=DiTConfig(
        dim=512, layers=3, heads=4, ffn=1024, text_dim=64, text_len=64, control="none", remat="block"
    ),
    data=LoaderConfig("unused", frames=9, batch=1),
    mesh=MeshConfig(1, -1, 4),
)
# 320 tokens a frame: with 256, 3 frames would make 768, a divisor of the time projection's 6 x 512 columns.
WHERE = {"topology": "v5e:2x4", "slices": 1, "height": 256, "width": 320, "tokens": 1e9}


@pytest.fixture(scope="module")
def report():
    return plan(SMALL, **WHERE)


def test_collectives_are_the_intended_ones(report):
    kinds = report["collective_bytes"]
    assert report["gathered_activations"] == 0
    assert set(kinds["all-to-all"]) == {"seq"}
    assert sum(kinds["reduce-scatter"].values()) > 0
    # What is still summed is vectors and numbers, not matrices.
    assert sum(kinds["all-reduce"].values()) < 0.2 * sum(kinds["all-gather"].values())


def test_state_is_split_over_all_devices(report):
    held = report["hbm_bytes_per_chip"]
    weights = report["flops"]["forward_of_a_sample"]["tokens"] / 2 / 3 / 256  # weights that meet every token
    assert 4 * weights / 8 < held["parameters"] < 1.5 * 4 * weights / 8
    assert held["optimizer"] == pytest.approx(2 * held["parameters"], rel=0.01)
    assert report["fits"] and held["total"] < report["hbm_limit_bytes"]
    assert (
        held["activations"] >= 3 * 3 * 256 // 4 * 512 * 2
    )  # layers, frames, tokens of a device, width, bf16


def test_counted_flops_agree_with_the_analytic_ones(report):
    flops = report["flops"]
    assert flops["attention_forward_passes"] == 2  # one more in the backward pass
    assert flops["matmul_per_chip_hlo"] == pytest.approx(flops["matmul_per_chip_analytic"], rel=0.15)


def test_the_report_has_the_promised_fields(report):
    promised = "fits hbm_bytes_per_chip hbm_limit_bytes step_seconds_roofline bound_by mfu tokens_per_second"
    assert set(promised.split()) | {"collective_bytes"} <= set(json.loads(json.dumps(report)))
    assert 0 < report["mfu_without_overlap"] <= report["mfu"] < 1
    assert "chip-hours" in describe(report)


def test_slices_are_joined_along_data_only():
    mesh = make_mesh(MeshConfig(2, -1, 4), topology_devices("v5e:2x4", slices=2))
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "seq": 4}
    assert (slices == slices[:, :1, :1]).all() and len(set(slices[:, 0, 0])) == 2
    with pytest.raises(ConfigError, match="mesh.data = 1: must be a multiple of 2 slices"):
        make_mesh(MeshConfig(1, -1, 4), topology_devices("v5e:2x4", slices=2))


def test_sizes_that_do_not_divide_are_one_line():
    with pytest.raises(ConfigError, match="product 3 must divide the 8 devices"):
        plan(dataclasses.replace(SMALL, mesh=MeshConfig(1, -1, 3)), **WHERE)
    with pytest.raises(ConfigError, match="generation 'v99' is not one of"):
        plan(SMALL, **WHERE | {"topology": "v99:2x2"})


def test_a_wrong_topology_is_one_line_and_exit_code_2():
    command = [sys.executable, "-m", "experiments.plan", "--config=experiments/configs/w14b.py:world"]
    done = subprocess.run([*command, "--topology=v5p:banana"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: --topology=v5p:banana: ")
