"""The one training loop: every stage and size runs through `train`."""

import dataclasses
import json
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from lingbot_jax.config import ConfigError
from lingbot_jax.data.loader import Batch as Window
from lingbot_jax.data.loader import TrainLoader
from lingbot_jax.models import params
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.codec import Codec
from lingbot_jax.models.text import TextEncoder
from lingbot_jax.parallel import multihost, sharding
from lingbot_jax.parallel.mesh import make_mesh
from lingbot_jax.parallel.sequence import attention_kernel
from lingbot_jax.training.checkpoints import Checkpoints, load_ema
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.training.encode import ClipEncoder
from lingbot_jax.training.metrics import MetricsWriter, StepProgress
from lingbot_jax.training.objectives.world import draw_given
from lingbot_jax.training.state import (
    Arrays,
    TrainState,
    abstract_model,
    abstract_state,
    init_state,
    random_arrays,
    random_key,
)
from lingbot_jax.training.step import Batch, make_train_step


class NonFiniteLoss(RuntimeError):
    """The loss is NaN or infinite; the message names the step and the records of the batch."""


def train(config: TrainConfig, codec: Codec, text_encoder: TextEncoder, loader: TrainLoader) -> TrainState:
    """Trains from the newest checkpoint, else from `config.init`, else from a random initialisation.

    Runs `config.steps` steps in all, writes metrics and checkpoints into `config.run`, and returns the state.
    SIGTERM (preemption) saves a checkpoint and returns early.

    Raises:
      ConfigError: the run directory holds a run of another configuration, or no readable checkpoint.
      NonFiniteLoss: nothing of the bad step or after it was saved.
    """
    config.check_codec(codec.config)
    run = pathlib.Path(config.run)
    first = jax.process_index() == 0  # writes the run's files; checkpoints are written by all
    if first:
        claim(run, config)

    # --- State, placed on the mesh: a checkpoint of this run, else the run named by `init`, else random.
    mesh = make_mesh(config.mesh)
    placed = place_state(config, mesh)
    checkpoints = Checkpoints(run, config.checkpoint)
    restored = checkpoints.restore(sharding.specs(abstract_state(config), placed))
    if restored:
        state, position = restored
        loader.set_state(position)
    else:
        state = fresh_state(config, mesh, placed)
    start = int(state.step)

    # --- Step, and how a window becomes its batch.
    step_fn = make_step(config, mesh, placed)
    encoder = ClipEncoder(codec, text_encoder, config.model, config.pose)
    metrics = MetricsWriter(run, start) if first else None

    # --- Loop. The loss of a step is read while the next one runs; a checkpoint waits for its own.
    pending: _Pending | None = None
    with StepProgress(config.stage, start, config.steps) as progress, multihost.preemption() as stop:
        for step in range(start, config.steps):
            window = next(loader)
            batch = multihost.global_batch(mesh, encode_window(encoder, window, config, step, mesh))
            state, values = step_fn(state, batch)
            if pending:
                _report(pending, config, metrics, progress)
            pending = _Pending(step + 1, values, window["record_ids"])
            stopped = stop(step + 1)
            last = step + 1 == config.steps or stopped
            if last or (step + 1) % config.checkpoint.every == 0:
                _report(pending, config, metrics, progress)
                pending = None
                checkpoints.save(step + 1, state, loader.get_state())
            if stopped:
                print(f"stopped by a signal after step {step + 1}; the same command resumes", flush=True)
                break
    checkpoints.wait()
    checkpoints.close()
    if metrics:
        metrics.close()
    return state


def place_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """The sharding of every array of the training state. Raises ConfigError where sizes do not divide."""
    axes = params.logical_axes(abstract_model(config))
    return sharding.shardings_by_path(abstract_state(config), axes, mesh)


def jit_step(config: TrainConfig, mesh: Mesh, placed: TrainState) -> Callable:
    """The training step (state, batch) -> (state, metrics), to be traced inside `sharding.use(mesh)`; the state
    is donated."""
    attend = Attend(kernel=attention_kernel(mesh, config.model.heads, config.mesh.ulysses))
    return jax.jit(make_train_step(config, attend), donate_argnums=0, out_shardings=(placed, None))


def make_step(config: TrainConfig, mesh: Mesh, placed: TrainState) -> Callable:
    """The training step for the mesh, ready to be called."""
    step = jit_step(config, mesh, placed)

    def on_mesh(state, batch):
        with sharding.use(mesh):
            return step(state, batch)

    return on_mesh


def fresh_state(config: TrainConfig, mesh: Mesh, placed: TrainState) -> TrainState:
    """The state a new run starts from; parameters are created, or read from `init`, where they belong."""
    given = {}
    if config.init is not None:
        given = load_ema(config.init, mesh)
        check_init(config, given)
    initial = lambda given: init_state(config, random_arrays(config) | given)
    with sharding.use(mesh):
        return jax.jit(initial, out_shardings=placed)(given)


def encode_window(encoder: ClipEncoder, window: Window, config: TrainConfig, step: int, mesh: Mesh) -> Batch:
    """Encodes this process's window with the tasks drawn for this step."""
    _, count = multihost.data_shard(mesh)
    key = random_key(config.seed, step, "tasks")
    given = draw_given(key, len(window["frames"]) * count, config.tasks)
    return encoder(window, window[config.tasks.caption], multihost.take_shard(given, mesh))


def claim(run: pathlib.Path, config: TrainConfig) -> None:
    """Writes config.json into a new run directory, or checks that an old one holds the same run.

    `steps`, `log_every`, `checkpoint` and `mesh` may change between resumptions; anything else would not be a
    continuation.

    Raises:
      ConfigError: another configuration, or the directory cannot be written.
    """
    path, wanted = run / "config.json", json.loads(json.dumps(dataclasses.asdict(config)))
    if path.exists():
        found = json.loads(path.read_text())
        for name in wanted.keys() - {"run", "steps", "log_every", "checkpoint", "mesh"}:
            if found.get(name) != wanted[name]:
                was, now = _difference(found.get(name), wanted[name])
                raise ConfigError(
                    f"{name}: {path} has {was}, this command {now}; choose another run directory"
                )
    try:
        run.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(wanted, indent=2) + "\n")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"run = {str(run)!r}: cannot be written ({error.strerror})") from None


def _difference(was, now) -> tuple[str, str]:
    """The parts of two configuration values that differ, for one line."""
    if isinstance(was, dict) and isinstance(now, dict):
        names = sorted(k for k in was.keys() | now.keys() if was.get(k) != now.get(k))
        return tuple(", ".join(f"{k} = {d.get(k)!r}" for k in names) for d in (was, now))
    return repr(was), repr(now)


def check_init(config: TrainConfig, given: Arrays) -> None:
    """Raises ConfigError unless the parameters read from `init` fit the model."""
    model = abstract_state(config)
    shapes = {path: leaf.shape for path, leaf in (model.trainable | model.frozen).items()}
    for path in sorted(given):
        if shapes.get(path) != given[path].shape:
            raise ConfigError(
                f"init = {config.init!r}: its parameter {path} does not fit model; use the same sizes"
            )


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
    if not np.isfinite(values["loss"]):
        records = ", ".join(pending.records)
        raise NonFiniteLoss(
            f"loss = {values['loss']} at step {pending.step}; the batch was records {records}; "
            "the last checkpoint is from before this step"
        )
    if metrics is None:
        return
    progress.update(pending.step, values["loss"])
    if pending.step % config.log_every == 0 or pending.step == config.steps:
        metrics.write(pending.step, values)
