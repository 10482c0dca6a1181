"""What a program of a run costs on a pod: compiled for its topology, held against what it is meant to do."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lingbot_jax import axes as ax
from lingbot_jax.models.params import flat_params
from lingbot_jax.parallel import sharding
from lingbot_jax.parallel.mesh import DATA, SEQ
from lingbot_jax.planning.compiled import MARGIN, compiled_or_needed, total_bytes
from lingbot_jax.planning.hlo import HloModule
from lingbot_jax.planning.intended import Intended, Matrix, state_faults
from lingbot_jax.planning.programs import Case, tokens_of
from lingbot_jax.planning.roofline import Roofline, collective_bytes, roofline
from lingbot_jax.training.networks import templates
from lingbot_jax.training.state import TrainState

ATTENTION_BACKWARD = 2.5  # of a self-attention forward, in kernels: five products for two


@dataclasses.dataclass(frozen=True)
class Plan:
    """A program of a run on a topology, as `--json` prints it. What is known only of a program that compiled, or only
    of a training step, is None elsewhere.

    Attributes:
      fits: the total leaves 5 % of HBM free. program: train or encode. phase: of the curriculum.
      batch: clips per step. remat, grad_accum_steps: of the config.
      hbm_bytes_per_chip: by what it is; `total` is the sum as the compiler has it.
      flops: of a step. collective_bytes: that a device receives in a step: kind -> mesh axes -> bytes.
      faults: one line for all that departs from what the step is meant to do.
      seconds: of a step, by what is used. step_seconds_roofline: the longest of them, everything else hidden.
      mfu, mfu_without_overlap: model FLOPs over peak, with all or no communication hidden.
      chip_hours: for `chip_hours_tokens` training tokens.
    """

    fits: bool
    program: str
    topology: str
    phase: int
    chips: int
    mesh: dict[str, int]
    batch: int
    tokens_per_step: int
    remat: str
    grad_accum_steps: int
    hbm_limit_bytes: int
    hbm_bytes_per_chip: dict[str, int]
    flops: dict[str, Any] | None = None
    collective_bytes: dict[str, dict[str, int]] | None = None
    collective_bytes_intended: dict[str, dict[str, float]] | None = None
    faults: list[str] | None = None
    seconds: dict[str, float] | None = None
    step_seconds_roofline: float | None = None
    bound_by: str | None = None
    mfu: float | None = None
    mfu_without_overlap: float | None = None
    tokens_per_second: float | None = None
    chip_hours: float | None = None
    chip_hours_tokens: float | None = None

    def timed(self, line: Roofline) -> "Plan":
        """With the times of a roofline."""
        return dataclasses.replace(
            self,
            seconds=line.terms | {"matmul": line.matmul, "attention": line.attention} | line.network,
            step_seconds_roofline=line.seconds,
            bound_by=line.bound_by,
            tokens_per_second=self.tokens_per_step / line.seconds,
        )

    def holding(self, **held: int) -> "Plan":
        """With more known of the memory; `total` decides whether it fits."""
        held = self.hbm_bytes_per_chip | held
        fits = "total" in held and held["total"] <= (1 - MARGIN) * self.hbm_limit_bytes
        return dataclasses.replace(self, fits=fits, hbm_bytes_per_chip=held)


def plan_encode(case: Case) -> Plan:
    """Compiles the program that turns the clips of a step into latents and text tokens; the training state is held
    beside it."""
    program = case.encode()
    codec, text, clips = program.args
    held = {"state": sharding.count_bytes(case.state()), "batch": sharding.count_bytes(clips)}
    held["encoders"] = sharding.count_bytes((codec, text))
    plan = _plan(case, "encode", held)
    compiled = compiled_or_needed(program)
    if isinstance(compiled, int):
        return plan.holding(total=compiled + held["state"])
    module, memory = HloModule(compiled.as_text()), compiled.memory_analysis()
    plan, _ = _counted(plan, case, module)
    parts = {"temporaries": memory.temp_size_in_bytes, "program": memory.generated_code_size_in_bytes}
    return plan.holding(**parts, total=total_bytes(memory) + held["state"])


def plan_train(case: Case, tokens: float = 1e11) -> Plan:
    """Compiles the training step; the encoders and networks that it does not see are held beside it.

    Args:
      tokens: training tokens that `chip_hours` are for.
    """
    program, whole = case.train(), case.state()
    state, encoded, null_text = program.args
    held = {name: sharding.count_bytes(tree) for name, tree in _parts(whole).items()}
    held["batch"] = sharding.count_bytes((encoded, null_text))
    held["encoders"] = sharding.count_bytes(case.encode().args[:2])
    unseen = sharding.count_bytes(whole) - sharding.count_bytes(state) + held["encoders"]
    plan = _plan(case, "train", held)
    compiled = compiled_or_needed(program)
    if isinstance(compiled, int):
        return plan.holding(total=compiled + unseen)
    module, memory = HloModule(compiled.as_text()), compiled.memory_analysis()
    kept = module.stacked_bytes(case.config.world.network.layers, set(_shard_shapes(state)))
    kept = min(kept, memory.temp_size_in_bytes)
    plan = plan.holding(
        activations=kept,
        temporaries=memory.temp_size_in_bytes - kept,
        program=memory.generated_code_size_in_bytes,
        total=total_bytes(memory) + unseen,
    )
    plan, line = (_counted if case.run.stage == "distill" else _arithmetic)(plan, case, module)
    seen = {name: sharding.count_bytes(tree) for name, tree in _parts(state).items()}
    split = state_faults(
        seen | {"batch": held["batch"]},
        *_whole_bytes(state),
        case.mesh.size // case.mesh.shape[DATA],
        memory.argument_size_in_bytes,
    )
    hours = tokens / (plan.tokens_per_step / line.seconds) * plan.chips / 3600
    faults = plan.faults + split if plan.faults is not None else split or None
    return dataclasses.replace(plan, faults=faults, chip_hours=hours, chip_hours_tokens=tokens)


PROGRAMS = {"train": plan_train, "encode": plan_encode}


def _plan(case: Case, program: str, held: dict[str, int]) -> Plan:
    """What is known before anything is compiled."""
    config = case.config
    return Plan(
        fits=False,
        program=program,
        topology=case.where.topology,
        phase=case.phase,
        chips=case.mesh.size,
        mesh=dict(case.mesh.shape),
        batch=config.data.batch,
        tokens_per_step=config.data.batch * tokens_of(case.config),
        remat=config.world.network.remat,
        grad_accum_steps=config.optimizer.grad_accum_steps,
        hbm_limit_bytes=int(case.chip.hbm),
        hbm_bytes_per_chip=held,
    )


def _arithmetic(plan: Plan, case: Case, module: HloModule) -> tuple[Plan, Roofline]:
    """With FLOPs, times and what departs from the intended collectives."""
    batch, mesh = plan.batch, case.mesh
    forward, backward = case.forward, case.forward.backward(case.adapters_only)
    # Attention, and all else with it, is computed again in the backward pass if a forward kernel is there.
    passes = 1 + any("rematted_computation" in op for op in module.kernel_calls("flash_forward"))
    attention = batch * forward.attention * (passes + ATTENTION_BACKWARD) / mesh.size
    model = float(batch * (forward.total + backward.total))
    repeated = (mesh.shape[SEQ] - 1) * (passes * forward.text + backward.text)
    matmul = batch * (passes * forward.products + backward.products + repeated) / mesh.size
    line, found = roofline(module, mesh, case.chip, attention_flops=attention, model_flops=model)
    intended = _intended(case)
    plan = dataclasses.replace(
        plan,
        flops={
            "model_per_step": model,
            "forward_of_a_sample": dataclasses.asdict(forward),
            "matmul_per_chip_analytic": matmul,
            "matmul_per_chip_hlo": module.matmul_flops(),
            "attention_per_chip": attention,
            "attention_forward_passes": passes,
            "peak": line.peak,
        },
        collective_bytes=collective_bytes(found),
        collective_bytes_intended=intended.bytes(),
        faults=intended.faults(found),
        mfu=line.mfu,
        mfu_without_overlap=line.mfu_exposed,
    )
    return plan.timed(line), line


def _counted(plan: Plan, case: Case, module: HloModule) -> tuple[Plan, Roofline]:
    """With what the compiled program says alone: of encoders, and of a step of several networks, there is nothing to
    compare it with. Attention kernels are not counted, so that its time is a lower bound.
    """
    line, found = roofline(module, case.mesh, case.chip, attention_flops=0.0, model_flops=0.0)
    flops = {"matmul_per_chip_hlo": module.matmul_flops(), "peak": line.peak}
    return dataclasses.replace(plan, flops=flops, collective_bytes=collective_bytes(found)).timed(line), line


def _intended(case: Case) -> Intended:
    config, network = case.config, case.config.world.network
    parts = config.optimizer.grad_accum_steps
    return Intended(
        mesh=dict(case.mesh.shape),
        matrices=tuple(_matrices(case)),
        microsteps=parts,
        tokens=tokens_of(case.config),
        text=network.text_len,
        width=network.head_dim,
        samples=config.data.batch // parts // case.rows,
        small=_small(case),
    )


def _matrices(case: Case) -> Iterator[Matrix]:
    """Every matrix of the network; those outside the blocks may be computed, and so sent, in float32."""
    name, network = next(iter(case.run.world.networks.items()))
    compute = jnp.dtype(network.dtype).itemsize
    for path, leaf in flat_params(templates(case.run)[name]).items():
        if _is_matrix(leaf):
            stacked = len(leaf.shape) > 2
            layers, itemsize = (leaf.shape[0], compute) if stacked else (1, 4)
            yield Matrix(leaf.shape[-2:], layers, itemsize, case.objective.trains(name, path))


def _small(case: Case) -> int:
    """Bytes of the gradients of all that is no matrix of `linear`, in float32."""
    name = next(iter(case.run.world.networks))
    small = [
        leaf.size
        for path, leaf in flat_params(templates(case.run)[name]).items()
        if not _is_matrix(leaf) and case.objective.trains(name, path)
    ]
    return 4 * sum(small)


def _is_matrix(leaf: nnx.Param) -> bool:
    """Whether it is a large one; low-rank adapters are not."""
    axes = leaf.get_metadata()["axes"]
    return len(axes) == 2 and not {None, ax.RANK} & set(axes)


def _parts(state: TrainState) -> dict[str, Any]:
    return {"parameters": state.params, "ema": state.ema, "optimizer": state.opt}


def _whole_bytes(state: TrainState) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of the matrices and of all else in each part of the state, unsplit."""
    matrices, vectors = {}, {}
    for name, tree in _parts(state).items():
        sizes = {True: 0, False: 0}
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            matrix = str(getattr(path[-1], "key", "")).endswith("kernel")
            sizes[matrix] += math.prod(leaf.shape) * leaf.dtype.itemsize
        matrices[name], vectors[name] = sizes[True], sizes[False]
    return matrices, vectors


def _shard_shapes(state: TrainState) -> Iterator[tuple[int, ...]]:
    for leaf in jax.tree.leaves(state):
        yield leaf.sharding.shard_shape(leaf.shape)
