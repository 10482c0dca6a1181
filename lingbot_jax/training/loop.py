"""The one training loop: every stage and size runs through `train`."""

import contextlib
import dataclasses
import json
import pathlib
import signal
import threading
from collections.abc import Iterator

import jax
import numpy as np

from lingbot_jax.config import ConfigError
from lingbot_jax.data.loader import Batch as Window
from lingbot_jax.data.loader import TrainLoader
from lingbot_jax.models.codec import Codec
from lingbot_jax.models.text import TextEncoder
from lingbot_jax.training.checkpoints import Checkpoints, load_ema
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.training.encode import ClipEncoder
from lingbot_jax.training.metrics import MetricsWriter, StepProgress
from lingbot_jax.training.objectives.world import draw_given
from lingbot_jax.training.state import (
    Arrays,
    TrainState,
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
    claim(run, config)

    # --- State: a checkpoint of this run, else the run named by `init`, else random.
    checkpoints = Checkpoints(run, config.checkpoint)
    restored = checkpoints.restore(abstract_state(config))
    if restored:
        state, position = restored
        loader.set_state(position)
    else:
        state = init_state(config, initial_arrays(config))
    start = int(state.step)

    # --- Step, and how a window becomes its batch.
    step_fn = jax.jit(make_train_step(config), donate_argnums=0)
    encoder = ClipEncoder(codec, text_encoder, config.model, config.pose)
    metrics = MetricsWriter(run, start)

    # --- Loop. The loss of a step is read while the next one runs; a checkpoint waits for its own.
    pending: _Pending | None = None
    with StepProgress(config.stage, start, config.steps) as progress, _preemption() as stop:
        for step in range(start, config.steps):
            window = next(loader)
            state, values = step_fn(state, encode_window(encoder, window, config, step))
            if pending:
                _report(pending, config, metrics, progress)
            pending = _Pending(step + 1, values, window["record_ids"])
            last = step + 1 == config.steps or stop.is_set()
            if last or (step + 1) % config.checkpoint.every == 0:
                _report(pending, config, metrics, progress)
                pending = None
                checkpoints.save(step + 1, state, loader.get_state())
            if stop.is_set():
                print(f"stopped by a signal after step {step + 1}; the same command resumes", flush=True)
                break
    checkpoints.wait()
    checkpoints.close()
    metrics.close()
    return state


def encode_window(encoder: ClipEncoder, window: Window, config: TrainConfig, step: int) -> Batch:
    """Encodes a loader window with the tasks drawn for this step."""
    given = draw_given(random_key(config.seed, step, "tasks"), len(window["frames"]), config.tasks)
    return encoder(window, window[config.tasks.caption], given)


def claim(run: pathlib.Path, config: TrainConfig) -> None:
    """Writes config.json into a new run directory, or checks that an old one holds the same run.

    `steps`, `log_every` and `checkpoint` may change between resumptions; anything else would not be a
    continuation.

    Raises:
      ConfigError: another configuration, or the directory cannot be written.
    """
    path, wanted = run / "config.json", json.loads(json.dumps(dataclasses.asdict(config)))
    if path.exists():
        found = json.loads(path.read_text())
        for name in wanted.keys() - {"run", "steps", "log_every", "checkpoint"}:
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


def initial_arrays(config: TrainConfig) -> Arrays:
    """Parameters a new run starts from: those of the run `init` where it has them, random ones elsewhere."""
    model = jax.jit(lambda: random_arrays(config))()
    if config.init is None:
        return model
    given = load_ema(config.init)
    unknown = sorted(given.keys() - model.keys())
    shapes = [path for path in given.keys() & model.keys() if given[path].shape != model[path].shape]
    for path in unknown + sorted(shapes):
        raise ConfigError(
            f"init = {config.init!r}: its parameter {path} does not fit model; use the same sizes"
        )
    return model | given


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A dispatched step whose values have not been read yet."""

    step: int
    values: dict[str, jax.Array]
    records: np.ndarray


def _report(pending: _Pending, config: TrainConfig, metrics: MetricsWriter, progress: StepProgress) -> None:
    values = {name: float(value) for name, value in pending.values.items()}
    if not np.isfinite(values["loss"]):
        records = ", ".join(pending.records)
        raise NonFiniteLoss(
            f"loss = {values['loss']} at step {pending.step}; the batch was records {records}; "
            "the last checkpoint is from before this step"
        )
    progress.update(pending.step, values["loss"])
    if pending.step % config.log_every == 0 or pending.step == config.steps:
        metrics.write(pending.step, values)


@contextlib.contextmanager
def _preemption() -> Iterator[threading.Event]:
    """An event that SIGTERM sets: save at the next step and stop. The old handler comes back at the end."""
    event = threading.Event()
    old = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, old)
