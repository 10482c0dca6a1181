"""Metrics of a run: metrics.jsonl, TensorBoard, W&B, a progress line. Nothing of it is needed to resume the run."""

import contextlib
import io
import json
import logging
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lingbot_jax.config import ConfigError
from lingbot_jax.files import is_remote, write_whole
from lingbot_jax.training.wandb_run import WandbRun
from lingbot_jax.worlds import storage

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

_log = logging.getLogger(__name__)

LINES = "metrics.jsonl"
UPLOAD_SECONDS = 30.0  # at least, between copies of metrics.jsonl to an object store, which cannot append
FPS = 16  # of the videos in TensorBoard

Mean = tuple[float, float]  # sum and count of values


class Means:
    """Means over an interval of steps, of what each step gives as sums and counts."""

    def __init__(self):
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, values: Mapping[str, Mean]) -> None:
        for name, (total, count) in values.items():
            self._sums[name][0] += float(total)
            self._sums[name][1] += float(count)

    def take(self) -> dict[str, float]:
        """The means since the last call; what was never counted is left out."""
        found = {name: total / count for name, (total, count) in self._sums.items() if count}
        self._sums.clear()
        return found


def read_metrics(run: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line cut off by a kill, and damaged ones, are left out."""
    return _read(storage.located(run) / LINES)[0]


def _read(path: epath.Path) -> tuple[list[dict[str, Any]], str]:
    """The lines, and what is wrong with the file or an empty text."""
    if not path.exists():
        return [], ""
    if not storage.is_file(path):
        return [], "not a file"
    try:
        content = path.read_bytes()
    except Exception as error:  # libraries of object stores have exceptions of their own
        return [], storage.reason(error)
    lines, wrong = [], ""
    for number, text in enumerate(content.splitlines(keepends=True)):
        if not text.endswith(b"\n"):
            continue
        try:
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line["step"], int):
                lines.append(line)
                continue
        except (ValueError, KeyError, RecursionError):
            pass
        wrong = wrong or f"line {number + 1} cannot be read"
    return lines, wrong


class MetricsWriter:
    """Appends metrics by step. On resume, lines after the restored step are dropped: they will be made again.

    A file of metrics that is damaged is moved aside with a warning, and the run goes on.

    Args:
      step: the restored one. wandb: what the metrics go to as well, and is closed with this.

    Raises:
      ConfigError: the files cannot be written, here or later.
    """

    def __init__(self, run: str | os.PathLike, step: int, wandb: WandbRun | None = None):
        run = storage.located(run)
        self._path, self._remote, self._wandb = run / LINES, is_remote(run), wandb
        lines, wrong = _read(self._path)
        with self._writing():
            if wrong:
                _move_aside(self._path, wrong)
            self._lines = [json.dumps(line) for line in lines if line["step"] <= step]
            self._upload()
            self._file = None if self._remote else self._path.open("a")
            self._board = self._open_board(run / "tensorboard", step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        line = json.dumps({"step": step, **metrics})
        with self._writing():
            if self._file is not None:
                self._file.write(line + "\n")
                self._file.flush()
            else:
                self._lines.append(line)
                if time.monotonic() - self._uploaded > UPLOAD_SECONDS:
                    self._upload()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.write(step, metrics)

    def videos(self, step: int, videos: Mapping[str, UInt8[np.ndarray, "f h w 3"]]) -> None:
        """Shows videos in TensorBoard and W&B, as moving pictures."""
        from tensorboardX.proto.summary_pb2 import Summary

        for name, frames in videos.items():
            first, *rest = [Image.fromarray(frame) for frame in frames]
            data = io.BytesIO()
            first.save(data, "gif", save_all=True, append_images=rest, duration=1000 // FPS, loop=0)
            shown = Summary.Image(
                height=frames.shape[1],
                width=frames.shape[2],
                colorspace=3,
                encoded_image_string=data.getvalue(),
            )
            summary = Summary(value=[Summary.Value(tag=name, image=shown)])
            self._board.file_writer.add_summary(summary, step)
            if self._wandb is not None:
                self._wandb.video(step, name, data.getvalue())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        else:
            with self._writing():
                self._upload()
        self._board.close()
        if self._wandb is not None:
            self._wandb.close()

    def _upload(self) -> None:
        write_whole(self._path, "".join(line + "\n" for line in self._lines))
        self._uploaded = time.monotonic()

    def _open_board(self, folder: epath.Path, purge_step: int) -> "SummaryWriter":
        # Half a second to import, and PyTorch with it where there is one: only for the process that writes.
        from tensorboardX import SummaryWriter

        if not self._remote and folder.exists() and not folder.is_dir():
            _move_aside(folder, "not a folder")
        try:
            return SummaryWriter(os.fspath(folder), purge_step=purge_step)
        except ImportError:  # tensorboardX writes to object stores with Google's library alone
            local = tempfile.mkdtemp(prefix="tensorboard-")
            _log.warning("%s needs google-cloud-storage: TensorBoard's files are in %s", folder, local)
            return SummaryWriter(local, purge_step=purge_step)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        say = "free space or mend the directory, then the same command resumes"
        with storage.errors_as(
            lambda why: ConfigError(f"run: {self._path} cannot be written ({why}); {say}")
        ):
            yield


def _move_aside(path: epath.Path, why: str) -> None:
    aside = path.with_name(f"{path.name}.damaged")
    if aside.exists():
        aside.rmtree() if aside.is_dir() else aside.unlink()
    path.rename(aside)
    _log.warning("%s: %s; moved to %s, the run goes on", path, why, aside.name)


class StepProgress:
    """A line with the steps done, steps per second, the loss and the time left; plain lines without a terminal."""

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
