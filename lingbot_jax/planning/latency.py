"""How long a chunk of play, the decoding of one, or a whole clip takes on TPUs that need not be there.

Three figures of the same compiled programs: `_hidden` if everything ran behind the longest of compute, HBM and network;
the plain one as the compiler has scheduled it (`schedule`); `_serial` if nothing ran beside anything.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.flops import forward_flops
from lingbot_jax.parallel import sharding
from lingbot_jax.planning.compiled import MARGIN, compiled_or_needed, total_bytes
from lingbot_jax.planning.hlo import HloModule
from lingbot_jax.planning.roofline import Roofline, axis_bandwidth, roofline
from lingbot_jax.planning.schedule import Rates, network_seconds, scheduled_seconds
from lingbot_jax.planning.serving import Serving
from lingbot_jax.rollout.sample import sample_config
from lingbot_jax.training.step import Program

DISPATCH = 5e-5  # seconds from the host's call to the program's start; an assumption
TO_HOST = 8e9  # bytes per second of frames to the host (PCIe, safe side); an assumption
KERNELS = "flash_forward"  # of attention
COMPUTES = {
    "none": "bfloat16",
    "int8": "bfloat16: int8 is how weights are stored (worlds/quantization.py); they are opened as bfloat16",
}


@dataclasses.dataclass(frozen=True)
class ServingPlan:
    """A program of serving on a topology, as `--json` prints it. What is known only of a program that fits is None
    elsewhere.

    Attributes:
      fits: the total leaves 5 % of HBM free. program: chunk, decode or sample. devices: JAX devices.
      weights: split over the devices, or whole on each. quantize, computes: what was asked for, and what multiplies.
      frames: video frames of a chunk or clip. window, sink: latent frames. passes: of the network, the cache-update
        pass included.
      chunk_seconds: as scheduled; of `sample`, of the whole clip. chunk_seconds_hidden, chunk_seconds_serial: bounds.
      key_to_frame_seconds: of a key that just missed a chunk, of chunks made one after another: `algorithm`, the wait
        for the running one; `compute`, its own; `transfer` of its frames to the host.
      flops: of the network per chunk, all devices together, each product counted once; flops_published: of the
        published loop, which does `flops_removed` besides. Decoding is in neither.
      terms: seconds by what is used. hbm_bytes_per_chip: by what it is.
    """

    fits: bool
    program: str
    topology: str
    devices: int
    mesh: dict[str, int]
    weights: str
    quantize: str
    computes: str
    height: int
    width: int
    frames: int
    window: int | None
    sink: int | None
    passes: int | None
    hbm_limit_bytes: int
    hbm_bytes_per_chip: dict[str, int]
    chunk_seconds: float | None = None
    chunk_seconds_hidden: float | None = None
    chunk_seconds_serial: float | None = None
    frames_per_second: float | None = None
    key_to_frame_seconds: float | None = None
    key_to_frame: dict[str, float] | None = None
    flops: float | None = None
    flops_published: float | None = None
    flops_removed: dict[str, float] | None = None
    terms: dict[str, float] | None = None
    bound_by: str | None = None


@dataclasses.dataclass(frozen=True)
class _Cost:
    """Of one compiled program: seconds as scheduled, by what is used, and bytes that it needs."""

    scheduled: float
    line: Roofline
    collectives: dict[str, float]
    bytes: int


def _cost(made: Serving, program: Program, attention_flops: float) -> _Cost | int:
    """The cost of a program, or the bytes of one that does not fit.

    Args:
      attention_flops: that one device runs inside kernels.
    """
    compiled = compiled_or_needed(program)
    if isinstance(compiled, int):
        return compiled
    return cost_of(
        made, HloModule(compiled.as_text()), total_bytes(compiled.memory_analysis()), attention_flops
    )


def cost_of(made: Serving, module: HloModule, needed: int, attention_flops: float) -> _Cost:
    """The cost of a program from its text."""
    mesh, chip = made.world.mesh, made.chip
    line, found = roofline(module, mesh, chip, attention_flops=attention_flops, model_flops=0.0)
    bandwidth = lambda axes: axis_bandwidth(mesh, axes, chip)
    runs = module.kernel_runs(KERNELS)
    rates = Rates(
        chip.flops, chip.bandwidth, network_seconds(found, bandwidth), line.attention / max(runs, 1)
    )
    sent: dict[str, float] = {}
    for one in found:
        if one.axes:
            name = f"{one.kind} over {'+'.join(one.axes)}"
            sent[name] = sent.get(name, 0.0) + one.bytes / bandwidth(one.axes)
    return _Cost(scheduled_seconds(module, rates), line, sent, needed)


def plan_serving(made: Serving, program: str, quantize: str = "none") -> ServingPlan:
    """Compiles the programs of `chunk`, `decode` or `sample`. Raises ConfigError: the world does not do that."""
    parts = {
        "chunk": {"network": made.advance, "decode": made.decode},
        "decode": {"decode": made.decode},
        "sample": {"network": made.sample},
    }[program]
    made_parts = {name: make() for name, make in parts.items()}
    attention = _attention(made, program) / made.world.mesh.size
    costs = {name: _cost(made, p, attention if name == "network" else 0.0) for name, p in made_parts.items()}
    return plan_of(made, program, quantize, made_parts, costs)


def plan_of(
    made: Serving, program: str, quantize: str, parts: dict[str, Program], costs: dict[str, _Cost | int]
) -> ServingPlan:
    """The plan of programs whose costs are known."""
    world = made.world
    held = {
        "weights": sharding.count_bytes(world.networks),
        "codec": sharding.count_bytes(world.codec),
        "text_encoder": sharding.count_bytes(world.text),
    }
    if program != "sample":
        held["cache"] = sharding.count_bytes(made.state().cache)
        held["stream"] = sharding.count_bytes(made.decode().args[2])
    needed = {name: cost if isinstance(cost, int) else cost.bytes for name, cost in costs.items()}
    worst = max(needed, key=needed.get)
    leaves = [x for x in jax.tree.leaves(parts[worst].args) if isinstance(x, jax.ShapeDtypeStruct)]
    arrays = [x for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    seen = sharding.count_bytes(arrays)
    held |= {"total": needed[worst] + max(0, sum(held.values()) - seen)}
    causal = None if program == "sample" else made.session.causal
    chunk = world.codec.config.latent_frames(made.frames) if causal is None else causal.chunk
    frames = made.frames if causal is None else chunk * world.codec.config.stride[0]
    plan = ServingPlan(
        fits=held["total"] <= (1 - MARGIN) * made.chip.hbm,
        program=program,
        topology=made.where.topology,
        devices=world.mesh.size,
        mesh=dict(world.mesh.shape),
        weights=made.weights,
        quantize=quantize,
        computes=COMPUTES[quantize],
        height=made.size[0],
        width=made.size[1],
        frames=frames,
        window=causal and causal.window,
        sink=causal and causal.sink,
        passes=_passes(made, program) if program != "decode" else None,
        hbm_limit_bytes=int(made.chip.hbm),
        hbm_bytes_per_chip=held,
    )
    timed = {name: cost for name, cost in costs.items() if not isinstance(cost, int)}
    return _timed(plan, made, timed) if timed.keys() == costs.keys() else plan


def _timed(plan: ServingPlan, made: Serving, costs: dict[str, _Cost]) -> ServingPlan:
    total: dict[str, float] = {"compute": 0.0, "hbm": 0.0, "network": 0.0}
    for cost in costs.values():
        total = {name: value + cost.line.terms[name] for name, value in total.items()}
    dispatch = DISPATCH * len(costs)
    terms: dict[str, float] = {}
    if "network" in costs:
        line = costs["network"].line
        terms |= {"matrix": line.matmul, "attention": line.attention, "hbm": line.hbm}
        terms |= costs["network"].collectives
    if "decode" in costs:
        terms["decode"] = costs["decode"].scheduled
        own = costs["decode"]
        terms |= {"decode: matrix": own.line.matmul, "decode: hbm": own.line.hbm}
        terms |= {f"decode: {name}": value for name, value in own.collectives.items()}
    terms["dispatch"] = dispatch
    seconds = sum(cost.scheduled for cost in costs.values()) + dispatch
    transfer = plan.frames * plan.height * plan.width * 3 / TO_HOST
    key = {"algorithm": seconds, "compute": seconds, "transfer": transfer}
    own, published, removed = _flops(made, plan.program)
    known: dict[str, Any] = {"flops": own, "flops_published": published, "flops_removed": removed}
    return dataclasses.replace(
        plan,
        chunk_seconds=seconds,
        chunk_seconds_hidden=max(total.values()) + dispatch,
        chunk_seconds_serial=sum(total.values()) + dispatch,
        frames_per_second=plan.frames / seconds,
        key_to_frame_seconds=sum(key.values()),
        key_to_frame=key,
        terms=terms,
        bound_by=max(total, key=total.get),
        **known,
    )


def _passes(made: Serving, program: str) -> int:
    """Passes of the network per chunk or clip, both branches of guidance counted."""
    if program == "sample":
        sample = sample_config(made.world.config)
        return sample.steps * (2 if sample.guidance.guided else 1)
    causal = made.session.causal
    steps = len(causal.levels) if causal.sample is None else causal.sample.steps
    return (steps + 1) * (2 if causal.guided else 1)


def _forward(made: Serving, program: str):
    """FLOPs of a pass, and latent frames that it generates and sees."""
    if program == "sample":
        frames = seen = made.world.codec.config.latent_frames(made.frames)
    else:
        frames, seen = made.session.causal.chunk, made.session.causal.window
    return forward_flops(made.world.config.network, frames, *made.latent), frames, seen


def _attention(made: Serving, program: str) -> float:
    """FLOPs of self-attention per chunk or clip, on all devices."""
    if program == "decode":
        return 0.0
    forward, frames, seen = _forward(made, program)
    return _passes(made, program) * forward.attention * seen / frames


def _flops(made: Serving, program: str) -> tuple[float | None, float | None, dict[str, float] | None]:
    """Of this loop, of the published one, and what that does besides."""
    if program == "decode":
        return None, None, None
    forward, frames, _ = _forward(made, program)
    passes, network = _passes(made, program), made.world.config.network
    once = 1 if program != "sample" else len(made.world.networks)  # every expert prepares its own
    own = passes * (forward.tokens + forward.cross) + _attention(made, program) + once * forward.adapters
    _, rows, columns = network.patch
    tokens = frames * math.prod(made.latent) // (rows * columns)
    removed = {
        "camera scale and shift, once instead of in every pass": float((passes - once) * forward.adapters),
        "time embedding, per frame instead of per token": float(passes * _time(network) * (tokens - frames)),
    }
    own += once * forward.text + passes * _time(network) * frames
    if program == "chunk":
        removed["text keys and values, once per prompt: here in every chunk"] = -float(forward.text)
    return float(own), own + sum(removed.values()), removed


def _time(network: DiTConfig) -> int:
    """FLOPs of the time embedding of one row: features, two layers, six vectors."""
    return 2 * (network.freq_dim * network.dim + 7 * network.dim**2)
