"""Compiles the real training step for a TPU topology, without a TPU, and says what it costs.

    python -m experiments.plan --config=experiments/configs/w14b.py:world --topology=v5p:4x4x4
    python -m experiments.plan --config=... --topology=v6e:8x8 --search
    python -m experiments.plan --config=... --topology=v5p:8x8x8 --phase=3 --json

Frames, size, batch, mesh and rematerialisation are those of the config, or with --phase those of one phase of its
curriculum; --search tries other meshes. docs/parallelism.md explains every figure. Needs the `tpu` extra (libtpu
compiles on any Linux machine).
"""

import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies
from lingbot_jax.parallel.hlo import Program
from lingbot_jax.parallel.intended import Intended, Matrix, state_faults
from lingbot_jax.parallel.plan import chip, collective_bytes, forward_flops, roofline

from experiments import common
from experiments.common import UserError
from lingbot_jax.config import require
from lingbot_jax.models.dit import Condition
from lingbot_jax.models.params import flat_params
from lingbot_jax.parallel import multihost, sharding
from lingbot_jax.parallel.mesh import DATA, SEQ, MeshConfig, make_mesh
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.training.loop import jit_step, place_state
from lingbot_jax.training.state import TrainState, abstract_model, abstract_state, take_expert
from lingbot_jax.training.step import Batch

CONFIG = common.define_config()
TOPOLOGY = flags.DEFINE_string("topology", None, "TPU generation and shape, e.g. v5p:8x8x4 or v6e:8x8")
SLICES = flags.DEFINE_integer("slices", 1, "slices of that shape, joined along the data axis", lower_bound=1)
PHASE = flags.DEFINE_integer("phase", None, "plan curriculum[PHASE] of the config instead of its own fields")
HEIGHT = flags.DEFINE_integer("height", None, "pixels; of the config's size by default")
WIDTH = flags.DEFINE_integer("width", None, "pixels; of the config's size by default")
TOKENS = flags.DEFINE_float("tokens", 1e11, "training tokens that chip_hours are for")
SEARCH = flags.DEFINE_bool("search", False, "try meshes, rematerialisation and microbatches; print the best")
TRIED = flags.DEFINE_integer("tried", 6, "candidates --search compiles, most promising first", lower_bound=1)
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


def size_of(config: TrainConfig, parts: int, height: int | None, width: int | None) -> Size:
    """The size of a step in which each of `parts` loads config.data.batch clips.

    Args:
      height, width: of the video; None: the config's.

    Raises:
      ConfigError, UserError: a length or a size that the model cannot take, or no size at all.
    """
    model, pixels = config.model, []
    for name, given, own, patch in zip(
        ("height", "width"), (height, width), config.size, model.patch[1:], strict=True
    ):
        value, multiple = own if given is None else given, model.spatial_stride * patch
        if value <= 0 or value % multiple:
            why = "the config has no size; " if given is None else ""
            raise UserError(f"--{name}={value}: {why}give a multiple of {multiple} pixels")
        pixels.append(value // model.spatial_stride)
    frames = 1 + (config.data.frames - 1) // model.mask_channels
    h, w = pixels
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


def _memory_error(error: Exception) -> int | None:
    """Bytes needed, from the compiler's out-of-memory message; of a step far too large it counts temporaries alone."""
    text = " ".join(str(error).split())
    found = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", text)
    found = found or re.search(
        r"required for HLO temporaries \(([\d.]+)([KMG])\) exceeds available HBM", text
    )
    return found and int(float(found[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[found[2]])


# What a plan knows only of a step that compiled.
UNKNOWN = (
    "flops collective_bytes collective_bytes_intended faults seconds step_seconds_roofline bound_by mfu "
)
UNKNOWN += "mfu_without_overlap tokens_per_second chip_hours"


def plan(
    config: TrainConfig,
    topology: str,
    slices: int = 1,
    height: int | None = None,
    width: int | None = None,
    tokens: float = 1e11,
) -> dict[str, Any]:
    """Compiles the step and returns everything --json prints; what is not known of a step that does not fit is None.

    Args:
      slices: of the topology. height, width: of the video; None: the config's. tokens: that chip_hours are for.

    Raises:
      ConfigError, UserError: sizes that do not fit the model or do not divide over the mesh.
    """
    devices = topology_devices(topology, slices)
    device = chip(topology)
    mesh = make_mesh(config.mesh, devices)
    size = size_of(config, len(multihost.data_parts(mesh)), height, width)
    accumulate = config.optimizer.accumulate
    require(
        size.batch % accumulate == 0, "optimizer.accumulate", accumulate, f"must divide {size.batch} clips"
    )
    rows, clips = mesh.size // mesh.shape[SEQ], config.data.batch
    require(
        size.batch // accumulate % rows == 0,
        "data.batch",
        clips,
        f"a microstep of {size.batch // accumulate} clips must divide over data x fsdp = {rows}",
    )
    held, other, state, placed, alone = step_state(config, mesh)
    batch = abstract_batch(config, size, mesh)
    held["batch"] = sharding.count_bytes(batch)
    report: dict[str, Any] = {
        "topology": topology,
        "chips": len(devices),
        "mesh": dict(mesh.shape),
        "batch": size.batch,
        "tokens_per_step": size.batch * size.tokens,
        "remat": config.model.remat,
        "accumulate": accumulate,
        "hbm_limit_bytes": int(device.hbm),
        "fits": False,
        "hbm_bytes_per_chip": held,
    } | dict.fromkeys(UNKNOWN.split())
    with sharding.use(mesh):
        lowered = jit_step(alone, mesh, placed).lower(state, batch)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            needed = _memory_error(error)
            if needed is None:
                raise
            return report | {"hbm_bytes_per_chip": held | {"total": needed + other}}

    # --- Memory. Outputs live in donated arguments, except for those that are not aliased.
    program, memory = Program(compiled.as_text()), compiled.memory_analysis()
    stacked = program.stacked_bytes(config.model.layers, set(_shard_shapes(state)))
    held["activations"] = min(stacked, memory.temp_size_in_bytes)
    held["temporaries"] = memory.temp_size_in_bytes - held["activations"]
    held["program"] = memory.generated_code_size_in_bytes
    arguments, outputs = (
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
    )
    held["total"] = arguments + outputs + memory.temp_size_in_bytes + held["program"] + other

    # --- Arithmetic. Attention is computed again in the backward pass if a forward kernel is there.
    flops = forward_flops(config.model, size.frames, size.height, size.width)
    passes = 1 + any("rematted_computation" in op for op in program.kernel_calls("flash_forward"))
    attention = size.batch * flops.attention * (passes + BACKWARD) / mesh.size
    model_flops = 3.0 * size.batch * flops.total
    repeated = flops.tokens + flops.cross + flops.text * mesh.shape[SEQ]

    # --- Time, and whether it sends and holds what it should.
    line, found = roofline(program, mesh, device, attention_flops=attention, model_flops=model_flops)
    intended = Intended(
        mesh=dict(mesh.shape),
        matrices=_matrices(alone),
        microsteps=accumulate,
        tokens=size.tokens,
        text=config.model.text_len,
        width=config.model.head_dim,
        samples=size.batch // accumulate // rows,
    )
    split = {name: sharding.count_bytes(tree) for name, tree in _parts(state).items()} | {
        "batch": held["batch"]
    }
    matrices, vectors = _whole_bytes(state)
    devices_of_a_replica = mesh.size // mesh.shape[DATA]
    faults = intended.faults(found)
    faults += state_faults(split, matrices, vectors, devices_of_a_replica, arguments)
    per_second = size.batch * size.tokens / line.seconds
    return report | {
        "fits": held["total"] <= device.hbm,
        "flops": {
            "model_per_step": model_flops,
            "forward_of_a_sample": dataclasses.asdict(flops),
            "matmul_per_chip_analytic": size.batch * repeated * (passes + 2) / mesh.size,
            "matmul_per_chip_hlo": program.matmul_flops(),
            "attention_per_chip": attention,
            "attention_forward_passes": passes,
            "peak": line.peak,
        },
        "collective_bytes": collective_bytes(found),
        "collective_bytes_intended": intended.bytes(),
        "faults": faults,
        "seconds": line.terms | {"matmul": line.matmul, "attention": line.attention} | line.network,
        "step_seconds_roofline": line.seconds,
        "bound_by": line.bound_by,
        "mfu": line.mfu,
        "mfu_without_overlap": line.mfu_exposed,
        "tokens_per_second": per_second,
        "chip_hours": tokens / per_second * len(devices) / 3600,
    }


def _parts(state: TrainState) -> dict[str, Any]:
    return {
        "parameters": (state.trainable, state.frozen),
        "ema": state.ema,
        "optimizer": state.optimizer,
    }


def _whole_bytes(state: TrainState) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of the matrices and of all else in each part of the state, unsplit."""
    matrices, vectors = {}, {}
    for name, tree in _parts(state).items():
        sizes = {True: 0, False: 0}
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            sizes[str(getattr(path[-1], "key", "")).endswith("kernel")] += (
                math.prod(leaf.shape) * leaf.dtype.itemsize
            )
        matrices[name], vectors[name] = sizes[True], sizes[False]
    return matrices, vectors


def step_state(config: TrainConfig, mesh) -> tuple[dict[str, int], int, TrainState, TrainState, TrainConfig]:
    """The state as plans need it.

    Returns:
      Bytes on a device by part; bytes of them that the step does not see (of two experts, the other one); the
      abstract state of the step, its shardings, and the run of one expert that the step is compiled from.
    """
    placed = place_state(config, mesh)
    state = sharding.specs(abstract_state(config), placed)
    held = {name: sharding.count_bytes(tree) for name, tree in _parts(state).items()}
    if config.expert != "both":
        return held, 0, state, placed, config
    alone = dataclasses.replace(config, expert="high")
    part = take_expert(state, "high")
    return (
        held,
        sharding.count_bytes(state) - sharding.count_bytes(part),
        part,
        take_expert(placed, "high"),
        alone,
    )


def _matrices(config: TrainConfig) -> tuple[Matrix, ...]:
    """Every matrix of the model; those outside the blocks may be computed, and so sent, in float32."""
    found, compute = [], jnp.dtype(config.model.dtype).itemsize
    for leaf in flat_params(abstract_model(config)).values():
        axes = leaf.get_metadata()["axes"]
        if len(axes) == 2 and None not in axes:
            stacked = len(leaf.shape) > 2
            layers = leaf.shape[0] if stacked else 1
            found.append(Matrix(leaf.shape[-2:], layers, compute if stacked else 4))
    return tuple(found)


def _shard_shapes(state) -> Iterator[tuple[int, ...]]:
    for leaf in jax.tree.leaves(state):
        yield leaf.sharding.shard_shape(leaf.shape)


# Bytes kept a token and layer between forward and backward, in multiples of (model width, feed-forward width) at 2
# bytes, and forward passes of a step: rough figures that order the search; the compiler has the last word.
KEPT = {"none": (40, 3, 3.0), "dots": (9, 1, 3.4), "full": (1, 0, 4.0)}


def candidates(
    config: TrainConfig, topology: str, slices: int, height: int | None, width: int | None
) -> list[TrainConfig]:
    """Configs on other meshes, with other rematerialisation and microbatches, the most promising first.

    A step keeps about the clips it has; where there are more rows of the mesh than clips, each row gets one.
    """
    model, device, devices = config.model, chip(topology), topology_devices(topology, slices)
    own = size_of(config, len(multihost.data_parts(make_mesh(config.mesh, devices))), height, width)
    frame, ranked = own.tokens // own.frames, []
    for seq in (1, 2, 4, 8, 16, 32):
        if len(devices) % (seq * slices) or frame % seq or model.dim % (len(devices) // slices):
            continue
        mesh = MeshConfig(slices, -1, seq)
        rows, parts = len(devices) // seq, len(multihost.data_parts(make_mesh(mesh, devices)))
        samples = max(1, own.batch // rows)
        for remat, (wide, deep, passes) in KEPT.items():
            for accumulate in (1, 2, 4):
                local = samples // accumulate * own.tokens / seq
                kept = 2 * local * model.layers * (wide * model.dim + deep * model.ffn)
                if samples % accumulate or kept > 0.9 * device.hbm:
                    continue
                tried = dataclasses.replace(
                    config,
                    mesh=mesh,
                    model=dataclasses.replace(model, remat=remat),
                    data=dataclasses.replace(config.data, batch=samples * rows // parts),
                    optimizer=dataclasses.replace(config.optimizer, accumulate=accumulate),
                    curriculum=(),
                )
                ranked.append(((passes, accumulate, seq), len(ranked), tried))
    return [tried for *_, tried in sorted(ranked, key=lambda r: r[:2])]


def search(config: TrainConfig, tried: int, **where: Any) -> list[dict[str, Any]]:
    """Compiles the first `tried` candidates; those that fit come first, by model FLOP utilisation.

    Says on stderr which one it compiles and how long the rest will take.
    """
    sizes = {name: where[name] for name in ("topology", "slices", "height", "width")}
    found = candidates(config, **sizes)[:tried]
    if not found:
        raise UserError(f"--search: no mesh of {where['topology']} divides this model and batch")
    reports: list[dict[str, Any]] = []
    start = time.monotonic()
    for i, candidate in enumerate(found):
        mesh, left = candidate.mesh, (time.monotonic() - start) / max(i, 1) * (len(found) - i)
        what = f"seq {mesh.seq}, remat {candidate.model.remat}, accumulate {candidate.optimizer.accumulate}"
        print(
            f"{i + 1}/{len(found)}: {what}" + (f"; {left:.0f} s left" if i else ""),
            file=sys.stderr,
            flush=True,
        )
        reports.append(plan(candidate, **where))
    return sorted(reports, key=lambda r: (not r["fits"], -(r["mfu_without_overlap"] or 0.0)))


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
    if report["seconds"] is None:
        return "\n".join(lines)
    flops, seconds, peak = report["flops"], report["seconds"], report["flops"]["peak"]
    ratio = flops["matmul_per_chip_hlo"] / flops["matmul_per_chip_analytic"]
    hidden = max(seconds["compute"], seconds["hbm"])
    lines += [
        f"  model FLOPs a step {flops['model_per_step']:.3e}; a device runs {flops['matmul_per_chip_hlo']:.3e} in "
        f"matrix products ({ratio:.3f} of the analytic count), {flops['attention_per_chip']:.3e} in attention kernels",
        *(f"  {kind} (GB): {_gigabytes(row)}" for kind, row in sorted(report["collective_bytes"].items())),
        *([f"  FAULT: {fault}" for fault in report["faults"]] or ["  sends and holds what it should"]),
        "  seconds: " + ", ".join(f"{name} {value:.3f}" for name, value in seconds.items()),
        f"  step {report['step_seconds_roofline']:.3f} s, bound by {report['bound_by']}: MFU {report['mfu']:.1%} = "
        f"{flops['model_per_step']:.3e} / ({report['step_seconds_roofline']:.3f} s x {peak:.3e} FLOP/s)",
        f"  no communication hidden: {hidden + seconds['network']:.3f} s, MFU {report['mfu_without_overlap']:.1%}",
        f"  {report['tokens_per_second']:,.0f} tokens/s, {report['chip_hours']:,.0f} chip-hours",
    ]
    return "\n".join(lines)


def chosen_phase(config: TrainConfig, phase: int | None) -> TrainConfig:
    """The run, or the run of one phase of its curriculum. Raises UserError for a phase that there is not."""
    if phase is None:
        return config
    count = len(config.curriculum)
    if not 0 <= phase < count:
        has = f"curriculum[0] to [{count - 1}]" if count else "no curriculum"
        raise UserError(f"--phase={phase}: the config has {has}")
    return config.phases()[phase]


def main() -> None:
    config = common.load(CONFIG, TrainConfig)
    if TOPOLOGY.value is None:
        raise UserError("--topology is missing: give e.g. --topology=v5p:4x4x4")
    config = chosen_phase(config, PHASE.value)
    where = {"topology": TOPOLOGY.value, "slices": SLICES.value, "height": HEIGHT.value, "width": WIDTH.value}
    where["tokens"] = TOKENS.value
    reports = search(config, TRIED.value, **where) if SEARCH.value else [plan(config, **where)]
    if JSON.value:
        print(json.dumps(reports[0] | ({"tried": reports} if SEARCH.value else {})))
    else:
        print("\n".join(describe(report) for report in reports))


if __name__ == "__main__":
    common.run(main)
