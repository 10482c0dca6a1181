"""The one training loop: every stage and size runs through `train`."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lingbot_jax.config import ConfigError
from lingbot_jax.data.loader import Batch as Window
from lingbot_jax.data.loader import LoaderConfig, TrainLoader, Transform
from lingbot_jax.models import params
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.codec import Codec
from lingbot_jax.models.control import is_adapter
from lingbot_jax.models.text import TextEncoder
from lingbot_jax.parallel import multihost, sharding
from lingbot_jax.parallel.mesh import make_mesh
from lingbot_jax.parallel.sequence import attention_kernel
from lingbot_jax.training import curriculum
from lingbot_jax.training.checkpoints import Checkpoints, load_config, load_ema
from lingbot_jax.training.config import Expert, TrainConfig
from lingbot_jax.training.encode import ClipEncoder
from lingbot_jax.training.metrics import MetricsWriter, StepProgress
from lingbot_jax.training.objectives.world import draw_given
from lingbot_jax.training.resize import resize_window
from lingbot_jax.training.state import (
    Arrays,
    TrainState,
    abstract_model,
    abstract_state,
    init_state,
    put_expert,
    put_paths,
    random_arrays,
    random_key,
    take_expert,
    take_paths,
)
from lingbot_jax.training.step import Batch, make_train_step


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is NaN or infinite; the message names the step and the records of the batch."""


ReadInit = Callable[[str, TrainConfig, Mesh], Arrays]
MakeLoader = Callable[[LoaderConfig, tuple[int, int], Transform], TrainLoader]


def read_run(init: str, config: TrainConfig, mesh: Mesh) -> Arrays:
    """The averaged parameters of a run directory, as `TrainConfig.init` names it. Raises ConfigError."""
    del config
    return load_ema(init, mesh)


def train(
    config: TrainConfig,
    codec: Codec,
    text_encoder: TextEncoder,
    read_init: ReadInit = read_run,
    make_loader: MakeLoader = TrainLoader,
) -> TrainState:
    """Trains from the newest checkpoint, else from `config.init`, else from a random initialisation.

    Runs `config.steps` steps in all, through the phases of the curriculum, writes metrics and checkpoints into
    `config.run`, and returns the state. SIGTERM (preemption) saves a checkpoint and returns early.

    Args:
      read_init: reads the parameters that `config.init` names, placed on a mesh.
      make_loader: makes the stream of windows of a phase, of this process's part of the data.

    Raises:
      ConfigError: the run directory holds a run of another configuration, or no readable checkpoint.
      NonFiniteLoss: nothing of the bad step or after it was saved.
      SaveFailed: a checkpoint could not be written; those before it are whole.
    """
    config.check_codec(codec.config)
    run = pathlib.Path(config.run)
    first = jax.process_index() == 0  # writes the run's files; checkpoints are written by all
    if first:
        claim(run, config)

    # --- State: a checkpoint of this run, else what `init` names, else random; on the first phase's mesh.
    mesh = make_mesh(config.phases()[0].mesh)
    placed = place_state(config, mesh)
    checkpoints = Checkpoints(run, config.checkpoint)
    restored = checkpoints.restore(sharding.specs(abstract_state(config), placed))
    state, position = restored or (fresh_state(config, mesh, placed, read_init), None)
    start = int(state.step)
    metrics = MetricsWriter(run, start) if first else None

    # --- Loop. The loss of a step is read while the next one runs; a checkpoint waits for its own.
    phase: _Phase | None = None
    pending: _Pending | None = None
    watched = StepProgress(config.stage, start, config.steps), multihost.preemption()
    with checkpoints, watched[0] as progress, watched[1] as stop:
        for step in range(start, config.steps):
            if phase is None or step == phase.end:
                if phase is not None:
                    phase.loader.close()
                phase = enter_phase(config, step, codec, text_encoder, make_loader, position)
                state = jax.device_put(state, phase.placed, donate=True)

            window = next(phase.loader)
            batch = encode_window(phase, window, step)
            expert = curriculum.expert_at(config, step)
            state, values = phase.steps[expert](state, batch)
            if pending:
                _report(pending, config, metrics, progress)
            pending = _Pending(step + 1, values, window["record_ids"])

            stopped = stop(step + 1)
            last = step + 1 == config.steps or stopped
            if last or (step + 1) % config.checkpoint.every == 0:
                _report(pending, config, metrics, progress)
                pending = None
                checkpoints.save(step + 1, state, {"phase": phase.index, "at": phase.loader.get_state()})
            if stopped:
                print(f"stopped by a signal after step {step + 1}; the same command resumes", flush=True)
                break
    if metrics:
        metrics.close()
    return state


@dataclasses.dataclass(frozen=True)
class _Phase:
    """What holds during one phase of the curriculum.

    Attributes:
      index: which one. end: the step it ends before. config: the run as this phase sees it.
      placed: shardings of the state. steps: the compiled step of each expert.
    """

    index: int
    end: int
    config: TrainConfig
    mesh: Mesh
    placed: TrainState
    steps: dict[Expert, Callable]
    loader: TrainLoader
    encoder: ClipEncoder


def enter_phase(
    config: TrainConfig,
    step: int,
    codec: Codec,
    text_encoder: TextEncoder,
    make_loader: MakeLoader,
    position: dict[str, Any] | None,
) -> _Phase:
    """Everything for the phase that `step` is in; `position` is what a checkpoint says of its loader, if any.

    A phase's clips begin anew where it does: the position of another phase, left by a checkpoint at the very
    end of that one, means nothing here.
    """
    index = curriculum.phase_at(config, step)
    chosen = config.phases()[index]
    mesh = make_mesh(chosen.mesh)
    placed = place_state(chosen, mesh)
    resize = functools.partial(resize_window, size=chosen.size)
    loader = make_loader(chosen.data, multihost.data_shard(mesh), resize)
    if position is not None and position["phase"] == index:
        loader.set_state(position["at"])
    steps = {
        expert: make_step(alone, mesh, placed, expert if config.expert == "both" else None)
        for expert, alone in curriculum.expert_runs(config, index).items()
    }
    encoder = ClipEncoder(codec, text_encoder, chosen.model, chosen.pose)
    end = curriculum.spans(config)[index][1]
    return _Phase(index, end, chosen, mesh, placed, steps, loader, encoder)


def place_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """The sharding of every array of the training state. Raises ConfigError where sizes do not divide."""
    axes = params.logical_axes(abstract_model(config))
    if config.expert == "both":  # their moments are named as those of one expert
        axes |= params.logical_axes(abstract_model(dataclasses.replace(config, expert="high")))
    return sharding.shardings_by_path(abstract_state(config), axes, mesh)


def jit_step(config: TrainConfig, mesh: Mesh, placed: TrainState) -> Callable:
    """The training step (state, batch) -> (state, metrics), to be traced inside `sharding.use(mesh)`; the state
    is donated."""
    attend = Attend(kernel=attention_kernel(mesh, config.model.heads, config.mesh.ulysses))
    return jax.jit(make_train_step(config, attend), donate_argnums=0, out_shardings=(placed, None))


def make_step(
    config: TrainConfig, mesh: Mesh, placed: TrainState, part: Expert | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The training step for the mesh, ready to be called.

    Args:
      placed: shardings of the state. part: the state is that of two experts, and `config` trains this one; the
        compiled program never sees the other.
    """
    step = jit_step(config, mesh, placed if part is None else take_expert(placed, part))

    def on_mesh(state, batch):
        with sharding.use(mesh):
            if part is None:
                return step(state, batch)
            new, values = step(take_expert(state, part), batch)
            return put_expert(state, part, new), values | {f"loss_{part}": values["loss"]}

    return on_mesh


def fresh_state(
    config: TrainConfig, mesh: Mesh, placed: TrainState, read_init: ReadInit = read_run
) -> TrainState:
    """The state a new run starts from; parameters are created, or read from `init`, where they belong."""
    given = {}
    if config.init is not None:
        given = start_arrays(config, [read_init(path, config, mesh) for path in config.init.split(",")])
        check_init(config, given)
    # Copied: one source may start two experts, and the state is donated to every step.
    initial = lambda given: init_state(config, random_arrays(config) | jax.tree.map(jnp.copy, given))
    with sharding.use(mesh):
        return jax.jit(initial, out_shardings=placed)(given)


def start_arrays(config: TrainConfig, sources: list[Arrays]) -> Arrays:
    """What `init` names, under the paths of this run's model: one or both experts from one or two sources.

    Raises:
      ConfigError: the sources are of another kind than `expert`.
    """
    expert = config.expert
    two = [any(path.startswith(("high.", "low.")) for path in source) for source in sources]
    if expert == "both" and len(sources) == 2 and not any(two):
        return put_paths(sources[0], "high") | put_paths(sources[1], "low")
    if len(sources) != 1:
        raise ConfigError(
            f'init = {config.init!r}: two sources, "HIGH,LOW", are for expert = both and of one expert each'
        )
    (source,) = sources
    if expert == "both":
        return source if two[0] else put_paths(source, "high") | put_paths(source, "low")
    if not two[0]:
        return source
    if expert == "single":
        raise ConfigError(f"init = {config.init!r}: has two experts; set expert to high, low or both")
    return take_paths(source, expert)


def check_init(config: TrainConfig, given: Arrays) -> None:
    """Raises ConfigError unless the parameters read from `init` fit the model. Adapters may be missing."""
    model = abstract_state(config)
    shapes = {path: leaf.shape for path, leaf in (model.trainable | model.frozen).items()}
    for path in sorted(given):
        if shapes.get(path) != given[path].shape:
            raise ConfigError(
                f"init = {config.init!r}: its parameter {path} does not fit model; use the same sizes"
            )
    for path in sorted(shapes.keys() - given.keys()):
        if not is_adapter(tuple(path.split(".")), None):
            raise ConfigError(f"init = {config.init!r}: has no parameter {path}; use the same model")


def encode_window(phase: _Phase, window: Window, step: int) -> Batch:
    """This process's window with the tasks drawn for this step, encoded and placed on the mesh."""
    config, mesh = phase.config, phase.mesh
    _, count = multihost.data_shard(mesh)
    key = random_key(config.seed, step, "tasks")
    given = multihost.take_shard(draw_given(key, len(window["frames"]) * count, config.tasks), mesh)
    return multihost.global_batch(mesh, phase.encoder(window, window[config.tasks.caption], given))


def claim(run: pathlib.Path, config: TrainConfig) -> None:
    """Writes config.json into a new run directory, or checks that an old one holds the same run.

    `steps`, `log_every`, `checkpoint` and meshes may change between resumptions; anything else would not be a
    continuation.

    Raises:
      ConfigError: another configuration, or the directory cannot be written.
    """
    path = run / "config.json"
    if path.exists():
        was, now = _lasting(load_config(run)), _lasting(config)
        for name in now:
            if was[name] != now[name]:
                before, after = _difference(was[name], now[name])
                raise ConfigError(
                    f"{name}: {path} has {before}, this command {after}; choose another run directory"
                )
    try:
        run.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"run = {str(run)!r}: cannot be written ({error.strerror})") from None


def _lasting(config: TrainConfig) -> dict[str, Any]:
    """The fields that must stay the same as long as a run lasts."""
    fields = dataclasses.asdict(config)
    for name in ("run", "steps", "log_every", "checkpoint", "mesh"):
        del fields[name]
    fields["curriculum"] = tuple(phase | {"mesh": None} for phase in fields["curriculum"])
    return fields


def _difference(was, now) -> tuple[str, str]:
    """The parts of two configuration values that differ, for one line."""
    if isinstance(was, dict) and isinstance(now, dict):
        names = sorted(k for k in was.keys() | now.keys() if was.get(k) != now.get(k))
        return tuple(", ".join(f"{k} = {d.get(k)!r}" for k in names) for d in (was, now))
    return repr(was), repr(now)


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A dispatched step whose values have not been read yet."""

    step: int
    values: dict[str, jax.Array]
    records: np.ndarray


def _report(
    pending: _Pending, config: TrainConfig, metrics: MetricsWriter | None, progress: StepProgress
) -> None:
    values = {name: float(value) for name, value in pending.values.items()}
    # Also the gradient: a finite loss with a gradient that is not would be saved as parameters that are not.
    for name in ("loss", "grad_norm"):
        if not np.isfinite(values[name]):
            raise NonFiniteLoss(
                f"{name} = {values[name]} at step {pending.step}; the batch was records "
                f"{', '.join(pending.records)}; the last checkpoint is from before this step"
            )
    if metrics is None:
        return
    progress.update(pending.step, values["loss"])
    if pending.step % config.log_every == 0 or pending.step == config.steps:
        metrics.write(pending.step, values)
