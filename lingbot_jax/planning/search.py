"""Other ways to run a phase on a topology: meshes, rematerialisation, microbatches; compiled, and the best named."""

import dataclasses
import shlex
import time
from collections.abc import Callable
from typing import NamedTuple

from lingbot_jax.config import ConfigError
from lingbot_jax.parallel.chips import chip
from lingbot_jax.parallel.mesh import MeshConfig
from lingbot_jax.planning.compiled import MARGIN
from lingbot_jax.planning.estimate import Plan, plan_train
from lingbot_jax.planning.programs import Where, case, chosen, field, tokens_of, topology_devices
from lingbot_jax.training.config import TrainConfig

# Bytes kept per token and layer between forward and backward, in multiples of (model width, feed-forward width) at 2
# bytes, and forward passes of a step: rough figures that order the search; the compiler has the last word.
KEPT = {"none": (40, 3, 3.0), "dots": (9, 1, 3.4), "full": (1, 0, 4.0)}


class Found(NamedTuple):
    """A candidate. flags: that make the config what was planned, to be copied."""

    plan: Plan
    flags: list[str]


def candidates(run: TrainConfig, where: Where, phase: int = 0) -> list[TrainConfig]:
    """Runs of the phase alone on other meshes, with other rematerialisation and microbatches, the most promising first.

    Those come first that keep the clips of a step. Of others a step has about as many, and each row of the mesh one at
    least: another batch, which trains differently.

    Raises:
      ConfigError: as `programs.chosen`.
    """
    _, config = chosen(run, where, phase)
    network, hbm = config.world.network, chip(where.topology).hbm
    devices, tokens = len(topology_devices(where.topology, where.slices)), tokens_of(config)
    frame, ranked = tokens // config.world.codec.latent_frames(config.data.frames), []
    for seq in (1, 2, 4, 8, 16, 32):
        if devices % (seq * where.slices) or frame % seq or network.dim % (devices // where.slices):
            continue
        rows = devices // seq
        samples = max(1, config.data.batch // rows)
        for remat, (wide, deep, passes) in KEPT.items():
            for parts in (1, 2, 4):
                local = samples // parts * tokens / seq
                kept = 2 * local * network.layers * (wide * network.dim + deep * network.ffn)
                if samples % parts == 0 and kept <= (1 - MARGIN) * hbm:
                    mesh = MeshConfig(data=where.slices, fsdp=-1, seq=seq)
                    other = _with(config, mesh, remat, samples * rows, parts)
                    changed = other.data.batch != config.data.batch
                    ranked.append(((changed, passes, parts, seq), len(ranked), other))
    return [other for *_, other in sorted(ranked, key=lambda r: r[:2])]


def _with(config: TrainConfig, mesh: MeshConfig, remat: str, batch: int, parts: int) -> TrainConfig:
    networks = {name: dataclasses.replace(n, remat=remat) for name, n in config.world.networks.items()}
    return dataclasses.replace(
        config,
        mesh=mesh,
        world=dataclasses.replace(config.world, networks=networks),
        data=dataclasses.replace(config.data, batch=batch),
        optimizer=dataclasses.replace(config.optimizer, grad_accum_steps=parts),
    )


def settings(run: TrainConfig, phase: int, found: TrainConfig) -> list[str]:
    """Flags that turn a phase of the run into what was found: of the fields that differ."""
    own = run.phases()[phase]
    values = {f"mesh.{axis}": lambda c, axis=axis: getattr(c.mesh, axis) for axis in ("data", "fsdp", "seq")}
    values |= {
        "data.batch": lambda c: c.data.batch,
        "optimizer.grad_accum_steps": lambda c: c.optimizer.grad_accum_steps,
    }
    for name in run.world.networks:
        values[f"world.networks.{name}.remat"] = lambda c, name=name: c.world.networks[name].remat
    differ = {path: of(found) for path, of in values.items() if of(found) != of(own)}
    return [shlex.quote(f"--{field(run, phase, path)}={value}") for path, value in differ.items()]


def search(
    run: TrainConfig,
    where: Where,
    phase: int = 0,
    *,
    max_candidates: int,
    tokens: float = 1e11,
    note: Callable[[str], None] = lambda line: None,
) -> list[Found]:
    """Compiles the first candidates; those that fit come first, by MFU without overlap.

    Args:
      note: told which one is compiled and how long the rest will take.

    Raises:
      ConfigError: as `programs.chosen`, or no mesh divides the model.
    """
    run, _ = chosen(run, where, phase)
    tried = candidates(run, where, phase)[:max_candidates]
    if not tried:
        raise ConfigError(f"--search: no mesh of {where.topology} divides this model and batch")
    found: list[Found] = []
    start = time.monotonic()
    for i, other in enumerate(tried):
        left = (time.monotonic() - start) / max(i, 1) * (len(tried) - i)
        remat, parts = other.world.network.remat, other.optimizer.grad_accum_steps
        what = f"{i + 1}/{len(tried)}: seq {other.mesh.seq}, remat {remat}, grad_accum_steps {parts}"
        note(what + (f"; {left:.0f} s left" if i else ""))
        plan = dataclasses.replace(plan_train(case(other, where), tokens), phase=phase)
        found.append(Found(plan, settings(run, phase, other)))
    return sorted(found, key=lambda f: (not f.plan.fits, -(f.plan.mfu_without_overlap or 0.0)))
