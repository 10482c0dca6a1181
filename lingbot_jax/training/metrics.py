"""Metrics of a run: metrics.jsonl, TensorBoard, and a progress line."""

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from lingbot_jax.config import ConfigError


def read_metrics(run: str | pathlib.Path) -> Iterator[dict[str, float]]:
    """The lines of a run's metrics.jsonl; a last line cut off by a kill is left out."""
    path = pathlib.Path(run) / "metrics.jsonl"
    if not path.exists():
        return
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


class MetricsWriter:
    """Appends metrics by step. On resume, lines after the restored step are dropped: they will be made again.

    Raises:
      ConfigError: the file cannot be written, here or later.
    """

    def __init__(self, run: str | pathlib.Path, step: int):
        run = pathlib.Path(run)
        kept = [line for line in read_metrics(run) if line["step"] <= step]
        self._path, partial = run / "metrics.jsonl", run / "metrics.jsonl.partial"
        with self._writing():
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
            partial.replace(self._path)
            self._file = self._path.open("a")
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"run: {self._path} cannot be written ({error.strerror}); free space or mend the directory, then the "
                "same command resumes"
            ) from None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        with self._writing():
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


class StepProgress:
    """A line with the steps done, steps a second, the loss and the time left; plain lines without a terminal."""

    def __init__(self, title: str, start: int, steps: int):
        self._title, self._steps = title, steps
        self._first: tuple[int, float] | None = (
            None  # step and time that rates count from: the first compiles
        )
        self._console = Console()
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        columns += [
            TextColumn("{task.fields[rate]:.2f} steps/s  loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
        ]
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(title, total=steps, completed=start, rate=0.0, loss=float("nan"))
        self._printed = self._began = time.monotonic()

    def __enter__(self) -> "StepProgress":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def update(self, step: int, loss: float) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
            self._console.print(f"{self._title}: first step after {now - self._began:.0f} s", highlight=False)
        rate = (step - self._first[0]) / max(now - self._first[1], 1e-9)
        self._bar.update(self._task, completed=step, rate=rate, loss=loss)
        due = now - self._printed > 20 and rate > 0 or step == self._steps
        if not self._console.is_terminal and due:
            left = (self._steps - step) / max(rate, 1e-9)
            print(
                f"{self._title} {step}/{self._steps}  {rate:.2f} steps/s  loss {loss:.4f}  {left:.0f} s left",
                flush=True,
            )
            self._printed = now
