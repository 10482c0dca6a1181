"""What a run says of itself: means of its metrics, where the time goes, a trace for XProf, samples."""

import concurrent.futures
import contextlib
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from lingbot_jax.config import ConfigError
from lingbot_jax.models.flops import training_flops
from lingbot_jax.parallel.chips import chip_of
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.training.goodput import Goodput, device_memory
from lingbot_jax.training.metrics import Means, MetricsWriter, StepProgress
from lingbot_jax.training.objectives import Mean

_log = logging.getLogger(__name__)


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is NaN or infinite; the message names the step and the records of the batch."""


class Clock:
    """Seconds of the parts of a step. Steps overlap: only one that is `measured` is waited for, part by part."""

    def __init__(self, measured: bool):
        self.seconds: dict[str, float] = {}
        self._measured, self._last = measured, time.perf_counter()

    def mark(self, part: str, dispatched: Any = None) -> None:
        """Ends a part; its result, if it is on the devices, is waited for."""
        if not self._measured:
            return
        jax.block_until_ready(dispatched)
        now = time.perf_counter()
        self.seconds[f"seconds_{part}"], self._last = now - self._last, now


def grace_warning(step: float, save: float, grace: float) -> str:
    """What a user should know who may be preempted, or an empty text; all in seconds.

    The signal can come when one step has just begun and the next is dispatched: both end before the save begins.
    """
    needed = 2 * step + save
    if needed <= grace:
        return ""
    return (
        f"SIGTERM may need {needed:.0f} s, two steps of {step:.1f} s and a checkpoint of {save:.1f} s, but "
        f"config.checkpoint.grace_seconds = {grace:g}: a preempted run would go back to the checkpoint before; make "
        "the grace period longer, or save more often"
    )


class Report:
    """Reads the metrics of a step while the next one runs, and writes their means every `log_every` steps.

    Beside what losses report: learning rate and gradient norm per network, seconds waiting for data, encoding and in
    the step (of one step per line), steps and tokens per second, on TPUs the model FLOP utilisation, the goodput, and
    memory of the devices.
    """

    def __init__(
        self, config: TrainConfig, writer: MetricsWriter | None, progress: StepProgress, goodput: Goodput
    ):
        self._config, self._writer, self._progress, self._goodput = config, writer, progress, goodput
        self._waiter = concurrent.futures.ThreadPoolExecutor(1)
        self._ended: concurrent.futures.Future[float] | None = None  # of the step that was dispatched last
        self._means = Means()
        self._pending: tuple[int, Mapping[str, Mean], np.ndarray, Clock] | None = None
        self._line: tuple[int, float] | None = None  # step and time of the last line, in this phase
        self._step_seconds: float | None = None  # of the last step that was measured
        self._warned = False

    def enter(self, phase: TrainConfig) -> None:
        """A phase begins: rates are its own, and its first step compiles."""
        t = phase.world.codec.latent_frames(phase.data.frames)
        network, codec = phase.world.network, phase.world.codec
        self._line, self._per_step = None, {"tokens": 0.0, "flops": 0.0}
        if phase.size != (0, 0) and phase.stage != "distill":  # whose rollouts differ from step to step
            height, width = (s // codec.stride[1] for s in phase.size)
            tokens = t * (height // network.patch[1]) * (width // network.patch[2])
            adapters = phase.stage == "action" or phase.lora.rank > 0
            flops = training_flops(network, t, height, width, adapters_only=adapters)
            self._per_step = {"tokens": float(phase.data.batch * tokens), "flops": phase.data.batch * flops}

    def clock(self, step: int, state: Any) -> Clock:
        """Of a step that begins; one step of each line is measured, once what was dispatched before it is done."""
        measured = (step + 1) % self._config.log_every == 0 and self._line is not None
        if measured:
            jax.block_until_ready(state)
        return Clock(measured)

    def later(self, step: int, metrics: Mapping[str, Mean], records: np.ndarray, clock: Clock) -> None:
        """Takes a dispatched step's values, and reads those of the one before."""
        self.now()
        self._pending = (step, metrics, records, clock)
        self._ended = self._waiter.submit(_when_ready, metrics)

    def busy_until(self) -> float:
        """When the step that was dispatched last had ended (monotonic seconds); inf if it still runs."""
        if self._ended is None:
            return -math.inf
        return self._ended.result() if self._ended.done() else math.inf

    def now(self) -> None:
        """Reads what is pending. Raises NonFiniteLoss, in every process alike."""
        if self._pending is None:
            return
        (step, metrics, records, clock), self._pending = self._pending, None
        values = {name: (float(mean.sum), float(mean.count)) for name, mean in metrics.items()}
        # Also the gradient: a finite loss with a gradient that is not would be saved as parameters that are not. And of
        # every update: a step may have several.
        found = [name for name in values if name.startswith(("loss", "grad_norm"))]
        for name in sorted(found, key=lambda name: (name not in ("loss", "grad_norm"), name)):
            if not np.isfinite(values[name][0]):
                raise NonFiniteLoss(
                    f"{name} = {values[name][0]} at step {step}; the batch was records {', '.join(records)}; the last "
                    "checkpoint is from before this step"
                )
        self._means.add(values)
        if self._writer is None:
            return
        if clock.seconds:
            self._step_seconds = sum(clock.seconds.values())
        self._progress.update(step, values["loss"][0] / values["loss"][1])
        if step % self._config.log_every == 0 or step == self._config.steps:
            self._writer.write(step, self._means.take() | clock.seconds | self._rates(step) | self._costs())
        elif self._line is None:
            self._line = (step, time.monotonic())  # the first step of a phase compiled

    def _costs(self) -> dict[str, float]:
        return self._goodput.shares() | device_memory()

    def last_line(self) -> None:
        """Where the time went."""
        if self._writer is not None:
            print(self._goodput.line(), flush=True)

    def _rates(self, step: int) -> dict[str, float]:
        """Since the last line."""
        now, line = time.monotonic(), self._line
        self._line = (step, now)
        if line is None:
            return {}
        rate = (step - line[0]) / max(now - line[1], 1e-9)
        found = {"steps_per_second": rate}
        if self._per_step["tokens"]:
            found["tokens_per_second"] = rate * self._per_step["tokens"]
            chip = chip_of(jax.devices()[0])
            if chip is not None:
                found["mfu"] = rate * self._per_step["flops"] / (chip.flops * jax.device_count())
        return found

    def check_grace(self, save: float | None) -> None:
        """Warns once where preemption would come too soon.

        Args:
          save: seconds of a checkpoint; None: not known.
        """
        if self._warned or save is None or self._step_seconds is None:
            return
        said = grace_warning(self._step_seconds, save, self._config.checkpoint.grace_seconds)
        self._warned = bool(said)
        if said:
            _log.warning(said)

    def validation(self, step: int, numbers: Mapping[str, float], videos: Mapping[str, np.ndarray]) -> None:
        """What the evaluation value measured, and samples to look at."""
        if self._writer is not None:
            self._writer.write(step, {f"validation_{name}": float(value) for name, value in numbers.items()})
            self._writer.videos(step, videos)
        self._line = None  # its seconds are none of training's


def _when_ready(values: Any) -> float:
    jax.block_until_ready(values)
    return time.monotonic()


class Profile:
    """Traces some steps of process 0 for XProf (TensorBoard's profile tab), into `RUN/tensorboard`.

    Args:
      steps: "100" or "100-105" (counted from 1, both included); empty: none.

    Raises:
      ConfigError: not such a range.
    """

    def __init__(self, run: str, steps: str):
        found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", steps)
        if steps and not (found and 0 < int(found[1]) <= int(found[2] or found[1])):
            raise ConfigError(f"profile = {steps!r}: must be a step or a range of steps, as 100 or 100-105")
        self._first, self._last = (int(found[1]), int(found[2] or found[1])) if steps else (0, 0)
        self._folder, self._running = str(epath.Path(run) / "tensorboard"), False

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around step `step`, counted from 0."""
        if step + 1 == self._first and jax.process_index() == 0:
            jax.profiler.start_trace(self._folder)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if step + 1 == self._last:
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.effects_barrier()
            jax.profiler.stop_trace()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        self._stop()
