"""The programs of a small session, compiled by the real TPU compiler: what they send, and how long a chunk takes."""

import dataclasses
import json

import pytest

pytest.importorskip("libtpu", reason="no libtpu")

from experiments.configs import w1_3b, w14b  # noqa: E402
from lingbot_jax.config import ConfigError, build  # noqa: E402
from lingbot_jax.models.config import VAEConfig  # noqa: E402
from lingbot_jax.planning.hlo import HloModule  # noqa: E402
from lingbot_jax.planning.latency import _flops, plan_serving  # noqa: E402
from lingbot_jax.planning.programs import Where, topology_devices  # noqa: E402
from lingbot_jax.planning.report import describe_serving  # noqa: E402
from lingbot_jax.planning.schedule import Rates, scheduled_seconds  # noqa: E402
from lingbot_jax.planning.serving import serving  # noqa: E402
from lingbot_jax.training.config import TrainConfig  # noqa: E402

pytestmark = pytest.mark.long

FAST = build(TrainConfig, w14b.get_config("fast").to_dict())
PROMISED = "fits chunk_seconds chunk_seconds_hidden chunk_seconds_serial frames_per_second key_to_frame_seconds window "
PROMISED += "passes flops flops_published terms"


def narrow(run: TrainConfig) -> TrainConfig:
    """Four layers of four heads, a VAE of eight channels, 16 tokens per frame."""
    network = dataclasses.replace(run.world.network, dim=512, heads=4, ffn=1024, layers=4)
    codec = VAEConfig(width=8, mults=(1, 1, 1, 1), blocks=1)
    world = dataclasses.replace(run.world, networks={"world": network}, codec=codec)
    return dataclasses.replace(run, world=world, size=(64, 64))


def test_a_chunk_of_a_narrow_world():
    """With whole parameters nothing but tokens, heads and borders of images travels."""
    made = serving(narrow(FAST), Where("v6e:2x2"), "whole")
    plan = plan_serving(made, "chunk", "int8")
    values = json.loads(json.dumps(dataclasses.asdict(plan)))
    assert next(iter(values)) == "fits" and set(PROMISED.split()) <= set(values) and plan.fits
    assert (plan.window, plan.sink, plan.passes, plan.frames, plan.devices) == (18, 6, 5, 12, 4)
    assert plan.computes.startswith("bfloat16")
    assert plan.chunk_seconds_hidden <= plan.chunk_seconds <= plan.chunk_seconds_serial
    assert plan.chunk_seconds >= max(plan.terms.values())
    assert {"matrix", "attention", "hbm", "decode", "dispatch", "all-to-all over seq"} <= set(plan.terms)
    # Per pass and layer q, k, v and the output of 3 x 16 tokens x 512 in bfloat16, three quarters of a part each; in
    # the last pass keys and values for the cache as well.
    sent = plan.terms["all-to-all over seq"] * 2 * 9e10
    assert sent == pytest.approx((5 * 4 + 2) * 4 * (48 * 512 * 2 / 4) * 3 / 4, rel=0.01)
    gathered = plan.terms.get("all-gather over seq", 0.0) * 2 * 9e10
    assert gathered < 2 * 4 * 512 * 512 / 4  # less than one of the matrices of all layers
    assert any("collective-permute" in name for name in plan.terms)
    held = plan.hbm_bytes_per_chip
    assert held["cache"] == pytest.approx(2 * 4 * 15 * 16 * 512 * 2 / 4, rel=0.01)
    assert held["total"] > held["weights"] + held["text_encoder"] + held["cache"]
    assert plan.key_to_frame_seconds == pytest.approx(2 * plan.chunk_seconds + 12 * 64 * 64 * 3 / 8e9)
    assert "frames per second, key to frame" in describe_serving(plan)


def test_flops_of_the_published_size():
    """By hand, for 14B at 480p: 4,680 queries on 28,080 keys; the camera's layers four times less."""
    own, published, removed = _flops(serving(FAST, Where("v6e:2x4")), "chunk")
    d, n, layers, ffn = 5120, 4680, 40, 13824
    attention = 5 * layers * 4 * n * 18 * 1560 * d
    matrices = 5 * layers * 2 * n * (6 * d * d + 2 * d * ffn)
    cross, camera = 5 * layers * 4 * n * 512 * d, layers * 2 * n * 4 * d * d
    text = layers * 2 * 512 * 2 * d * d
    assert own == pytest.approx(attention + matrices + cross + camera + text, rel=0.01)
    assert own / published < 0.88 and published == pytest.approx(own + sum(removed.values()))
    assert max(removed, key=removed.get).startswith("camera") and max(removed.values()) > 4 * camera


LOOP = """HloModule chunk, is_scheduled=true

%body (p: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %p = (s32[], f32[16,8]{1,0:S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[16,8]{1,0:S(1)} get-tuple-element(%p), index=1
  %far = f32[8,8]{1,0} constant({...})
  %copy = (f32[8,8]{1,0}, f32[8,8]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%far)
  %sum = f32[16,8]{1,0:S(1)} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  %near = f32[8,8]{1,0:S(1)} copy-done(%copy)
  %y = f32[16,8]{1,0:S(1)} convolution(%sum, %near), dim_labels=bf_io->bf
  ROOT %out = (s32[], f32[16,8]{1,0:S(1)}) tuple(%i, %y)
}

%cond (q: (s32[], f32[16,8])) -> pred[] {
  %q = (s32[], f32[16,8]{1,0:S(1)}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (a: f32[16,8]) -> f32[16,8] {
  %a = f32[16,8]{1,0:S(1)} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[16,8]{1,0:S(1)}) tuple(%zero, %a)
  %loop = (s32[], f32[16,8]{1,0:S(1)}) while(%start), condition=%cond, body=%body
  ROOT %r = f32[16,8]{1,0:S(1)} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize("sum_takes, run", [(3.0, 3.0 + 2.0), (0.25, 1.0 + 2.0)])
def test_a_copy_runs_beside_a_sum_and_not_beside_what_waits_for_it(sum_takes, run):
    rates = Rates(flops=16 * 8 * 8, bandwidth=8 * 8 * 4, network={"sum": sum_takes}, kernel=0.0)
    assert scheduled_seconds(HloModule(LOOP), rates) == pytest.approx(5 * run)


def test_one_chip_is_a_topology():
    assert len(topology_devices("v6e:1x1")) == 1 and len(topology_devices("tpu7x:1x1x1")) == 2


def test_refusals_are_one_line():
    world = build(TrainConfig, w1_3b.get_config("world").to_dict() | {"curriculum": ()})
    with pytest.raises(ConfigError, match="config.world.causal = None"):
        serving(world, Where("v6e:1x1")).advance()
    with pytest.raises(
        ConfigError, match="tokens per latent frame: 1560 does not divide over seq = 16 devices"
    ):
        serving(FAST, Where("tpu7x:2x2x2")).advance()
