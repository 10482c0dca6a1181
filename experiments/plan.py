"""Compiles the real training step for a TPU topology, without a TPU, and says what it costs.

    python -m experiments.plan --config=experiments/configs/w14b.py:world --topology=v5p:4x4x4
    python -m experiments.plan --config=... --topology=v6e:8x8 --search
    python -m experiments.plan --config=... --topology=v5p:8x8x8 --json

Mesh, batch and rematerialisation are those of the config; --search tries others. docs/parallelism.md explains
every figure. Needs the `tpu` extra (libtpu compiles on any Linux machine).
"""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies

from experiments import common
from experiments.common import UserError
from lingbot_jax.config import ConfigError
from lingbot_jax.models.dit import Condition
from lingbot_jax.parallel import multihost, sharding
from lingbot_jax.parallel.hlo import Program
from lingbot_jax.parallel.mesh import BATCH_AXES, MeshConfig, make_mesh
from lingbot_jax.parallel.plan import (
    chip,
    collective_bytes,
    forward_flops,
    gathered_activations,
    roofline,
)
from lingbot_jax.parallel.sequence import attention_kernel
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.training.loop import jit_step, place_state
from lingbot_jax.training.state import abstract_state
from lingbot_jax.training.step import Batch

CONFIG = common.define_config()
TOPOLOGY = flags.DEFINE_string("topology", None, "TPU generation and shape, e.g. v5p:8x8x4 or v6e:8x8")
SLICES = flags.DEFINE_integer("slices", 1, "slices of that shape, joined along the data axis")
HEIGHT = flags.DEFINE_integer("height", 480, "pixels")
WIDTH = flags.DEFINE_integer("width", 832, "pixels")
TOKENS = flags.DEFINE_float("tokens", 1e11, "training tokens that chip_hours are for")
SEARCH = flags.DEFINE_bool("search", False, "try meshes, rematerialisation and microbatches; print the best")
TRIED = flags.DEFINE_integer("tried", 6, "candidates that --search compiles, most promising first")
JSON = flags.DEFINE_bool("json", False, "print one JSON object")

BACKWARD = 2.5  # of a self-attention forward: five products for two


def topology_devices(name: str, slices: int = 1) -> list[jax.Device]:
    """Devices of a TPU topology that need not exist. Raises UserError for an unknown one."""
    # No metadata server here, and several compilers may run at once: there is no device to lock.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    many = {"num_slices": slices} if slices > 1 else {}
    chip(name)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **many).devices
    except Exception as error:  # libtpu raises several types
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"--topology={name}: {reason}; give e.g. v5e:4x8, v5p:8x8x4, v6e:8x8, tpu7x:4x4x4"
        ) from None


@dataclasses.dataclass(frozen=True)
class Size:
    """What one step works on: latents `frames x height x width`, samples of the whole batch, tokens of one."""

    frames: int
    height: int
    width: int
    batch: int
    tokens: int


def size_of(config: TrainConfig, parts: int, height: int, width: int) -> Size:
    """The size of a step in which each of `parts` loads config.data.batch clips. Raises ConfigError."""
    model = config.model
    for name, pixels, patch in (("height", height, model.patch[1]), ("width", width, model.patch[2])):
        if pixels % (model.spatial_stride * patch):
            raise UserError(f"--{name}={pixels}: must be a multiple of {model.spatial_stride * patch} pixels")
    frames = 1 + (config.data.frames - 1) // model.mask_channels
    h, w = height // model.spatial_stride, width // model.spatial_stride
    tokens = frames * (h // model.patch[1]) * (w // model.patch[2])
    return Size(frames, h, w, config.data.batch * parts, tokens)


def abstract_batch(config: TrainConfig, size: Size, mesh) -> Batch:
    model = config.model
    placed = sharding.batch_sharding(mesh)
    make = lambda *shape: jax.ShapeDtypeStruct((size.batch, *shape), jnp.float32, sharding=placed)
    video = (size.frames, size.height, size.width)
    condition = Condition(
        text=make(model.text_len, model.text_dim),
        control=make(*video, model.control_channels) if model.control != "none" else None,
        mask=make(*video, model.mask_channels) if model.image_condition else None,
        image=make(*video, model.latent_channels) if model.image_condition else None,
    )
    return Batch(make(*video, model.latent_channels), condition)


def _memory_error(error: Exception) -> tuple[float, float] | None:
    """(needed, limit) in bytes, from the compiler's out-of-memory message."""
    found = re.search(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm", str(error))
    scale = {"K": 2**10, "M": 2**20, "G": 2**30}
    return found and (float(found[1]) * scale[found[2]], float(found[3]) * scale[found[4]])


def plan(
    config: TrainConfig, topology: str, slices: int, height: int, width: int, tokens: float
) -> dict[str, Any]:
    """Compiles the step and returns everything --json prints. Raises ConfigError for sizes that do not divide."""
    devices = topology_devices(topology, slices)
    device = chip(topology)
    mesh = make_mesh(config.mesh, devices)
    size = size_of(config, len(multihost.data_parts(mesh)), height, width)
    accumulate = config.optimizer.accumulate
    if size.batch % accumulate:
        raise ConfigError(f"optimizer.accumulate = {accumulate}: must divide the batch of {size.batch}")
    sharding.check_divides("batch of a microstep", size.batch // accumulate, BATCH_AXES, mesh)
    placed = place_state(config, mesh)
    state = sharding.specs(abstract_state(config), placed)
    batch = abstract_batch(config, size, mesh)
    flops = forward_flops(config.model, size.frames, size.height, size.width)
    report: dict[str, Any] = {
        "topology": topology,
        "chips": len(devices),
        "mesh": dict(mesh.shape),
        "batch": size.batch,
        "tokens_per_step": size.batch * size.tokens,
        "remat": config.model.remat,
        "accumulate": accumulate,
        "hbm_limit_bytes": int(device.hbm),
    }
    held = {
        "parameters": sharding.count_bytes((state.trainable, state.frozen)),
        "ema": sharding.count_bytes(state.ema),
        "optimizer": sharding.count_bytes(state.optimizer),
        "batch": sharding.count_bytes(batch),
    }
    with sharding.use(mesh):
        lowered = jit_step(config, mesh, placed).lower(state, batch)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            needed = _memory_error(error)
            if needed is None:
                raise
            report |= {"fits": False, "hbm_limit_bytes": int(needed[1])}
            return report | {"hbm_bytes_per_chip": held | {"total": int(needed[0])}}

    program = Program(compiled.as_text())
    memory = compiled.memory_analysis()
    stacked = program.stacked_bytes(config.model.layers, set(_shard_shapes(state)))
    held["activations"] = min(stacked, memory.temp_size_in_bytes)
    held["temporaries"] = memory.temp_size_in_bytes - held["activations"]
    held["total"] = memory.argument_size_in_bytes + memory.temp_size_in_bytes

    # Passes of self-attention, from the kernels' runs: recomputation shows as a second forward.
    forward = sum(runs for name, runs in program.kernels().items() if "forward" in name)
    rings = mesh.shape["seq"] // _ulysses(config, mesh)
    passes = round(forward / (config.model.layers * accumulate * rings))
    attention = size.batch * flops.attention * (passes + BACKWARD) / mesh.size
    model_flops = 3.0 * size.batch * flops.total
    line, found = roofline(program, mesh, device, attention_flops=attention, model_flops=model_flops)
    repeated = flops.tokens + flops.cross + flops.text * mesh.shape["seq"]
    per_second = size.batch * size.tokens / line.seconds
    return report | {
        "fits": held["total"] <= device.hbm,
        "hbm_bytes_per_chip": held,
        "flops": {
            "model_per_step": model_flops,
            "forward_of_a_sample": dataclasses.asdict(flops),
            "matmul_per_chip_analytic": size.batch * repeated * (passes + 2) / mesh.size,
            "matmul_per_chip_hlo": program.matmul_flops(),
            "attention_per_chip": attention,
            "attention_forward_passes": passes,
        },
        "collective_bytes": collective_bytes(found),
        "gathered_activations": len(gathered_activations(found, size.tokens, config.model.dim)),
        "seconds": line.terms | {"matmul": line.matmul, "attention": line.attention} | line.network,
        "step_seconds_roofline": line.seconds,
        "bound_by": line.bound_by,
        "mfu": line.mfu,
        "mfu_without_overlap": line.mfu_exposed,
        "tokens_per_second": per_second,
        "chip_hours": tokens / per_second * len(devices) / 3600,
    }


def _shard_shapes(state) -> Iterator[tuple[int, ...]]:
    for leaf in jax.tree.leaves(state):
        yield leaf.sharding.shard_shape(leaf.shape)


def _ulysses(config: TrainConfig, mesh) -> int:
    return attention_kernel(mesh, config.model.heads, config.mesh.ulysses).ulysses


# Bytes kept a token and layer between forward and backward, in multiples of (model width, feed-forward width) at 2
# bytes, and forward passes of a step: rough figures that order the search; the compiler has the last word.
KEPT = {"none": (40, 3, 3.0), "dots": (9, 1, 3.4), "block": (1, 0, 4.0)}


def candidates(config: TrainConfig, topology: str, slices: int, size: Size) -> list[TrainConfig]:
    """Configs on other meshes, with other rematerialisation and microbatches, the most promising first."""
    model, device = config.model, chip(topology)
    devices = len(topology_devices(topology, slices))
    frame = size.tokens // size.frames
    ranked = []
    for seq in (1, 2, 4, 8, 16, 32):
        if devices % (seq * slices) or frame % seq or model.dim % (devices // slices):
            continue
        for remat, (wide, deep, passes) in KEPT.items():
            for accumulate in (1, 2, 4):
                if config.data.batch % accumulate:
                    continue
                local = config.data.batch / accumulate * size.tokens / seq
                kept = 2 * local * model.layers * (wide * model.dim + deep * model.ffn)
                if kept > device.hbm:
                    continue
                tried = dataclasses.replace(
                    config,
                    mesh=MeshConfig(slices, -1, seq),
                    model=dataclasses.replace(model, remat=remat),
                    optimizer=dataclasses.replace(config.optimizer, accumulate=accumulate),
                )
                ranked.append(((passes, accumulate, seq), len(ranked), tried))
    return [tried for *_, tried in sorted(ranked, key=lambda r: r[:2])]


def search(config: TrainConfig, tried: int, **where: Any) -> list[dict[str, Any]]:
    """Compiles the first `tried` candidates that divide; those that fit come first, by model FLOP utilisation."""
    parts = len(
        multihost.data_parts(make_mesh(config.mesh, topology_devices(where["topology"], where["slices"])))
    )
    size = size_of(config, parts, where["height"], where["width"])
    reports: list[dict[str, Any]] = []
    for candidate in candidates(config, where["topology"], where["slices"], size):
        if len(reports) == tried:
            break
        try:
            reports.append(plan(candidate, **where))
        except ConfigError as error:
            print(f"skipped {candidate.mesh.sizes} {candidate.model.remat}: {error}", file=sys.stderr)
    if not reports:
        raise UserError(f"--search: no mesh of {where['topology']} divides this model and batch")
    return sorted(reports, key=lambda r: (not r["fits"], -r.get("mfu", 0.0)))


def _gigabytes(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value / 1e9:.2f}" for name, value in values.items())


def describe(report: dict[str, Any]) -> str:
    """The report for people."""
    mesh = " x ".join(f"{name} {size}" for name, size in report["mesh"].items())
    held, limit = report["hbm_bytes_per_chip"], report["hbm_limit_bytes"]
    lines = [
        f"{report['topology']}: {report['chips']} devices, {mesh}; batch {report['batch']}, "
        f"{report['tokens_per_step']:,} tokens a step, remat {report['remat']}, accumulate {report['accumulate']}",
        f"  {'fits' if report['fits'] else 'DOES NOT FIT'}: {held['total'] / 1e9:.1f} of {limit / 1e9:.1f} GB a device",
        f"  HBM (GB): {_gigabytes(held)}",
    ]
    if "seconds" not in report:
        return "\n".join(lines)
    flops, seconds = report["flops"], report["seconds"]
    ratio = flops["matmul_per_chip_hlo"] / flops["matmul_per_chip_analytic"]
    lines += [
        f"  model FLOPs a step {flops['model_per_step']:.3e}; a device runs {flops['matmul_per_chip_hlo']:.3e} in "
        f"matrix products ({ratio:.3f} of the analytic count), {flops['attention_per_chip']:.3e} in attention kernels",
        "  received a device (GB): "
        + "; ".join(f"{kind} {_gigabytes(row)}" for kind, row in report["collective_bytes"].items()),
        "  seconds: " + ", ".join(f"{name} {value:.3f}" for name, value in seconds.items()),
        f"  step {report['step_seconds_roofline']:.3f} s, bound by {report['bound_by']}; MFU {report['mfu']:.1%} = "
        f"{flops['model_per_step']:.3e} / ({report['step_seconds_roofline']:.3f} s x peak), "
        f"{report['mfu_without_overlap']:.1%} if no communication overlaps",
        f"  {report['tokens_per_second']:,.0f} tokens/s, {report['chip_hours']:,.0f} chip-hours",
    ]
    return "\n".join(lines)


def main() -> None:
    config = common.load(CONFIG, TrainConfig)
    if TOPOLOGY.value is None:
        raise UserError("--topology is missing: give e.g. --topology=v5p:4x4x4")
    where = {"topology": TOPOLOGY.value, "slices": SLICES.value, "height": HEIGHT.value, "width": WIDTH.value}
    where["tokens"] = TOKENS.value
    reports = search(config, TRIED.value, **where) if SEARCH.value else [plan(config, **where)]
    if JSON.value:
        print(json.dumps(reports[0] | ({"tried": reports} if SEARCH.value else {})))
    else:
        print("\n".join(describe(report) for report in reports))


if __name__ == "__main__":
    common.run(main)
