"""The programs of a small run, compiled by the real TPU compiler: what they send, hold and count."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

pytest.importorskip("libtpu", reason="no libtpu")

from lingbot_jax.config import ConfigError  # noqa: E402
from lingbot_jax.data.config import DataConfig  # noqa: E402
from lingbot_jax.models import dit, layers  # noqa: E402
from lingbot_jax.models.config import DiTConfig, LinearCodecConfig, NgramConfig, UMT5Config, VAEConfig  # noqa: E402
from lingbot_jax.parallel.mesh import BATCH_AXES, MeshConfig, make_mesh  # noqa: E402
from lingbot_jax.planning import search as search_module  # noqa: E402
from lingbot_jax.planning.estimate import Plan, plan_encode, plan_train  # noqa: E402
from lingbot_jax.planning.programs import Where, case, topology_devices  # noqa: E402
from lingbot_jax.planning.report import describe, line  # noqa: E402
from lingbot_jax.planning.search import candidates, settings  # noqa: E402
from lingbot_jax.training import step  # noqa: E402
from lingbot_jax.training.config import Phase, TaskConfig, TrainConfig  # noqa: E402
from lingbot_jax.worlds.config import WorldConfig  # noqa: E402

pytestmark = pytest.mark.long

NETWORK = DiTConfig(
    dim=512, layers=2, heads=4, ffn=1024, text_dim=64, text_len=48, control="none", remat="full"
)
SMALL = TrainConfig(
    run="unused",
    stage="world",
    steps=10,
    codec="unused",
    world=WorldConfig(
        networks={"world": NETWORK},
        codec=LinearCodecConfig(channels=16),
        text=NgramConfig(dim=64, length=48),
    ),
    data=DataConfig("unused", frames=9, batch=2),
    tasks=TaskConfig(max_conditioning_frames=2),
    # 320 tokens per frame: with 256, 3 frames would make 768, a divisor of the time projection's 6 x 512 columns.
    size=(256, 320),
    mesh=MeshConfig(1, -1, 4),
)
WHERE = Where("v5p:2x2x2")
PROMISED = "fits hbm_bytes_per_chip hbm_limit_bytes step_seconds_roofline bound_by mfu tokens_per_second "
PROMISED += "collective_bytes"


def with_networks(config: TrainConfig, *names: str, **changed) -> TrainConfig:
    networks = dict.fromkeys(names, dataclasses.replace(NETWORK, **changed))
    return dataclasses.replace(config, world=dataclasses.replace(config.world, networks=networks))


def as_json(plan) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(plan)))


@pytest.fixture(scope="module")
def plan():
    """Of two slices, so that every axis of the mesh has something to do."""
    data = dataclasses.replace(SMALL.data, batch=4)
    run = dataclasses.replace(SMALL, mesh=MeshConfig(2, -1, 4), data=data)
    return plan_train(case(run, dataclasses.replace(WHERE, slices=2)), tokens=1e9)


@pytest.fixture(scope="module")
def action_plan():
    run = dataclasses.replace(with_networks(SMALL, "high", "low", control="cam"), stage="action")
    return plan_train(case(run, Where("v6e:2x4")), tokens=1e9)


def test_it_sends_and_holds_what_it_should(plan):
    kinds, meant = plan.collective_bytes, plan.collective_bytes_intended
    assert plan.faults == []
    assert set(kinds["all-to-all"]) == {"seq"}
    assert [kind for kind, row in kinds.items() if "data" in row] == ["all-reduce"]
    # Between slices: what is left of each gradient after two scatters, in at most float32.
    held = plan.hbm_bytes_per_chip["parameters"]
    assert 0.4 * held < kinds["all-reduce"]["data"] < 1.2 * held
    for kind in ("all-gather", "reduce-scatter"):  # no fault is no proof if nothing was counted
        assert sum(kinds[kind].values()) > 0.6 * sum(meant[kind].values())


def test_state_is_split_over_all_devices(plan):
    held = plan.hbm_bytes_per_chip
    weights = plan.flops["forward_of_a_sample"]["tokens"] / 2 / 3 / 320  # weights that meet every token
    assert 4 * weights / 8 < held["parameters"] < 1.8 * 4 * weights / 8
    assert held["optimizer"] == pytest.approx(2 * held["parameters"], rel=0.01)
    assert plan.fits and held["total"] < plan.hbm_limit_bytes
    assert (
        held["activations"] >= 2 * 3 * 320 // 4 * 512 * 2
    )  # layers, frames, tokens of a device, width, bf16
    # Donated: new parameters, average and moments take the place of the old ones.
    once = sum(held[name] for name in ("parameters", "ema", "optimizer", "batch", "encoders"))
    work = sum(held[name] for name in ("activations", "temporaries", "program"))
    assert once + work < held["total"] < 1.1 * once + work


def test_counted_flops_agree_with_the_analytic_ones(plan):
    flops = plan.flops
    assert flops["attention_forward_passes"] == 2  # one more in the backward pass
    assert flops["matmul_per_chip_hlo"] == pytest.approx(flops["matmul_per_chip_analytic"], rel=0.15)
    assert flops["model_per_step"] == 3 * plan.batch * sum(flops["forward_of_a_sample"].values())


def test_the_plan_has_the_promised_fields(plan):
    values = as_json(plan)
    assert next(iter(values)) == "fits" and set(PROMISED.split()) <= set(values)
    assert 0 < plan.mfu_without_overlap <= plan.mfu < 1
    first, second = describe(plan).splitlines()[-2:]
    assert (
        first.startswith("FITS: ") and "a step takes " in second and "1e+09 training tokens take " in second
    )
    assert "phase 0: batch 4" in line(plan)


def test_adapters_alone_cost_less(action_plan):
    """Frozen weights have no gradient: less is computed, scattered and held; the other expert is held as well."""
    plan, held = action_plan, action_plan.hbm_bytes_per_chip
    flops, forward = plan.flops, plan.flops["forward_of_a_sample"]
    assert plan.faults == [] and plan.fits
    assert flops["matmul_per_chip_hlo"] == pytest.approx(flops["matmul_per_chip_analytic"], rel=0.15)
    assert (
        2 * plan.batch * sum(forward.values())
        < flops["model_per_step"]
        < 3 * plan.batch * sum(forward.values())
    )
    sent, meant = plan.collective_bytes, plan.collective_bytes_intended
    assert sum(meant["reduce-scatter"].values()) < 0.2 * sum(meant["all-gather"].values())
    assert sum(sent["reduce-scatter"].values()) > 0.6 * sum(meant["reduce-scatter"].values())
    assert held["ema"] < 0.4 * held["parameters"]
    assert held["optimizer"] == pytest.approx(2 * held["ema"], rel=0.01)
    # Arguments of the step, its work, and what it does not see: the other expert and the encoders.
    once = sum(held[name] for name in ("parameters", "ema", "optimizer", "batch", "encoders"))
    work = sum(held[name] for name in ("activations", "temporaries", "program"))
    assert once + work < 1.05 * held["total"] and held["total"] < 1.1 * once + work


def test_wrong_implementations_are_found(monkeypatch):
    """Tokens gathered over seq, gradients summed whole, moments replicated: all in one program."""
    placed = step.abstract_state

    def replicated(config, mesh, *others):
        state = placed(config, mesh, *others)
        whole = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), state.opt)
        return dataclasses.replace(state, opt=step.sharding.specs(state.opt, whole))

    gathered = lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))
    weights = lambda x, kernel: x @ kernel[...].astype(x.dtype)  # as the compiler likes
    monkeypatch.setattr(step, "abstract_state", replicated)
    monkeypatch.setattr(dit, "constrain_tokens", gathered)
    monkeypatch.setattr(layers, "linear", weights)
    plan = plan_train(case(SMALL, WHERE))
    found = "\n".join(plan.faults)
    assert "the tokens of whole samples" in found
    assert "a whole gradient, not scattered" in found
    assert "optimizer: " in found
    assert "FAULT: " in describe(plan) and "FAULT" in line(plan)


def test_what_does_not_fit_has_all_fields_too():
    large = with_networks(SMALL, "world", dim=8192, heads=64, ffn=32768, layers=64)
    large = dataclasses.replace(large, data=dataclasses.replace(SMALL.data, batch=16))
    plan = plan_train(case(large, Where("v5e:2x4")))
    assert not plan.fits and set(PROMISED.split()) <= set(as_json(plan))
    assert plan.mfu is None and plan.hbm_bytes_per_chip["total"] > plan.hbm_limit_bytes
    assert "DOES NOT FIT" in describe(plan)


def test_the_encoders_are_planned_beside_the_state():
    """Of the published kinds, narrow: their products, and the training state that stays where it is."""
    text = UMT5Config(vocab=512, dim=64, heads=4, head_dim=16, ffn=128, layers=2, length=48)
    codec = VAEConfig(width=8, mults=(1, 1, 1, 1), blocks=1)
    world = dataclasses.replace(SMALL.world, codec=codec, text=text)
    run = dataclasses.replace(SMALL, world=world, size=(64, 64))
    made = case(run, WHERE)
    plan = plan_encode(made)
    held = plan.hbm_bytes_per_chip
    assert plan.fits and plan.program == "encode" and plan.mfu is None and plan.faults is None
    assert held["state"] == pytest.approx(4 * plan_state_bytes(made), rel=0.01)
    assert held["total"] > held["state"] + held["temporaries"] + held["encoders"]
    # Of one row of the batch: a q, k, v, o and three matrices of the network per layer, scores and values.
    tokens = 2 * 48 * 2 * (4 * 64 * 64 + 3 * 64 * 128) + 2 * 4 * 48 * 48 * 64
    assert plan.flops["matmul_per_chip_hlo"] > tokens
    assert plan.step_seconds_roofline > 0 and "a step takes" in describe(plan)


def plan_state_bytes(made) -> int:
    """A float32 network split over all devices: parameters, average and two moments are 4 of it."""
    return sum(leaf.size for leaf in made.state().params["world"].values()) * 4 // made.mesh.size


def test_phases_are_planned_by_their_number():
    phases = (Phase(5, frames=13), Phase(10, frames=9, batch=4, mesh=MeshConfig(1, -1, 2)))
    run = dataclasses.replace(SMALL, curriculum=phases)
    first, second = case(run, WHERE), case(run, WHERE, 1)
    assert (first.config.data.frames, first.config.mesh.seq) == (13, 4)
    assert (second.config.data.frames, second.config.data.batch, second.config.mesh.seq) == (9, 4, 2)
    with pytest.raises(ConfigError, match=r"--phase=2: the config has curriculum\[0\] to \[1\]"):
        case(run, WHERE, 2)
    with pytest.raises(ConfigError, match="--phase=1: the config has no curriculum"):
        case(SMALL, WHERE, 1)


def test_of_two_experts_one_is_stepped():
    made = case(with_networks(SMALL, "high", "low"), WHERE)
    state, encoded, constants = made.train().args
    assert set(made.state().params) == {"high", "low"} and len(state.params) == 1
    assert encoded.latents.shape == (2, 3, 32, 40, 16) and constants.null_text.shape == (1, 48, 64)
    assert encoded.latents.sharding.spec == PartitionSpec(BATCH_AXES)


def test_candidates_divide_the_mesh_and_prefer_the_batch():
    found = candidates(SMALL, WHERE)
    assert len(found) > 4 and len(set(map(repr, found))) == len(found)
    for candidate in found:
        rows = 8 // candidate.mesh.seq
        assert candidate.data.batch % (rows * candidate.optimizer.grad_accum_steps) == 0
    assert {candidate.mesh.seq for candidate in found} == {1, 2, 4, 8}
    kept = [candidate.data.batch == 2 for candidate in found]
    assert kept[0] and kept == sorted(kept, reverse=True)


def test_what_was_found_is_named_as_flags():
    other = dataclasses.replace(with_networks(SMALL, "world", remat="dots"), mesh=MeshConfig(1, -1, 2))
    flags = settings(SMALL, 0, other)
    assert flags == ["--config.mesh.seq=2", "--config.world.networks.world.remat=dots"]
    phases = (Phase(5, batch=4), Phase(10, mesh=MeshConfig(1, -1, 1)))
    run = dataclasses.replace(SMALL, curriculum=phases)
    assert settings(run, 0, other)[:2] == ["--config.mesh.seq=2", "'--config.curriculum[0].batch=2'"]
    assert settings(run, 1, other)[0] == "'--config.curriculum[1].mesh.seq=2'"


def test_a_search_puts_what_fits_first_and_then_what_is_fast(monkeypatch):
    """With compiled programs made up: at seq 1 nothing fits, at others the MFU is the number of devices."""

    def made_up(made, tokens):
        seq = made.mesh.shape["seq"]
        blank = dict.fromkeys(field.name for field in dataclasses.fields(Plan))
        known = {"fits": seq > 1, "mesh": dict(made.mesh.shape), "mfu_without_overlap": seq / 10}
        return Plan(**blank | known)

    monkeypatch.setattr(search_module, "plan_train", made_up)
    notes: list[str] = []
    found = search_module.search(SMALL, WHERE, max_candidates=100, note=notes.append)
    assert len(found) == len(notes) and notes[0].startswith(f"1/{len(notes)}: seq 4, remat none")
    order = [(f.plan.fits, f.plan.mesh["seq"]) for f in found]
    assert order == sorted(order, key=lambda o: (not o[0], -o[1])) and not order[-1][0]
    assert "--config.mesh.seq=8" in found[0].flags
    with pytest.raises(ConfigError, match="--search: no mesh of v5p:2x2x3 divides"):
        search_module.search(SMALL, Where("v5p:2x2x3"), max_candidates=1)


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
            r"config.data.batch = 2: a microstep of 2 clips must divide over .* = 4",
        ),
        ({"size": (0, 0)}, {}, "--height=0: the config has no size; give a multiple of 16 pixels"),
        ({}, {"width": 100}, "--width=100: give a multiple of 16 pixels"),
        ({}, {"topology": "v99:2x2"}, "generation 'v99' is not one of v5e, v5p, v6e, tpu7x"),
        (
            {"data": DataConfig("unused", frames=9, batch=3)},
            {"topology": "v5p:2x2x3"},
            "512 does not divide over fsdp x seq = 12 devices",
        ),
        ({}, {"slices": 2}, "mesh.data = 1: must be a multiple of 2 slices"),
    ],
)
def test_refusals_are_one_line(changed, where, words):
    with pytest.raises(ConfigError, match=words):
        case(dataclasses.replace(SMALL, **changed), dataclasses.replace(WHERE, **where)).train()
