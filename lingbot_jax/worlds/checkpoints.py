"""Checkpoints of a run: a folder of named arrays (`worlds.storage`) per step, written asynchronously by Orbax.

Orbax writes a step into a temporary folder and gives it its name when it is whole, so a run killed meanwhile leaves
the checkpoint before it. A step that was damaged later, be it by one bit, is reported and passed over.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from lingbot_jax.config import ConfigError
from lingbot_jax.parallel import multihost
from lingbot_jax.worlds import checksums, storage

T = TypeVar("T")
_log = logging.getLogger(__name__)

COMMITTED = "commit_success.txt"  # Orbax's, the last file of a step


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; those before it are whole. The message is one line for the user."""


class Checkpoints:
    """The checkpoints of one run; all processes of a job call the same methods.

    Args:
      run: the run's folder, local or gs://. keep: newest checkpoints that are kept.
      read_only: for reading a run that another process may be writing.

    Raises:
      ConfigError: the folder cannot be made.
    """

    def __init__(self, run: str | os.PathLike, keep: int = 3, read_only: bool = False):
        self._run, self._directory = run, storage.located(run) / "checkpoints"
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None
        self._sealing: _Sealing | None = None
        self._save_seconds: float | None = None
        if read_only:
            return
        with multihost.agree_on_errors(), self._making():
            self._directory.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            save_interval_steps=1,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,  # what a killed run left half written
        )
        with self._making():
            self._manager = ocp.CheckpointManager(
                self._directory, options=options, item_handlers=storage.item_handlers()
            )

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were written to their end, rising; the same in every process."""
        with (
            multihost.agree_on_errors(),
            storage.errors_as(lambda why: ConfigError(f"run = {str(self._run)!r}: cannot be read ({why})")),
        ):
            there = jax.process_index() == 0 and self._directory.exists()
            found = sorted(ocp.utils.checkpoint_steps(self._directory)) if there else []
        return multihost.from_first(found)

    def save(self, step: int, tree: Any) -> None:
        """Starts writing; returns once the values have left the device, so the arrays may be donated.

        Args:
          tree: any tree of arrays. Its paths (`storage.named`) are the names in the checkpoint.

        Raises:
          SaveFailed: this one cannot be begun, or the one before it could not be written.
        """
        self.wait()
        items = storage.items(storage.named(tree))
        self._saving, began = step, time.monotonic()
        with self._writing():
            if step in self._manager.all_steps():  # a damaged one, which `restore` passed over
                self._manager.delete(step)
            self._manager.save(step, args=items, force=True)
        if jax.process_index() == 0:
            self._sealing = _Sealing(self._directory / str(step), began)

    def restore(self, template: Any) -> Any | None:
        """The newest whole checkpoint in the structure of `template`; None if there is none.

        All processes come to the same step: one that any of them cannot read is passed over by all.

        Args:
          template: a tree of ShapeDtypeStruct with shardings, of everything that was saved.

        Raises:
          ConfigError: there are checkpoints and none of them can be read; or they are of other arrays.
        """
        return self._newest(lambda folder: storage.read(folder, template))

    def averaged(self, network: str, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """A network's parameters in the newest whole checkpoint, averaged where they trained (`ema`).

        Args:
          wanted: parameters by path; each is read into its place.

        Raises:
          ConfigError: the run has no checkpoint yet, or none that can be read; or another network.
        """

        def read(folder: epath.Path) -> dict[str, jax.Array]:
            stored = storage.Reader(folder).specs
            names = {path: f"ema.{network}.{path}" for path in wanted}
            names = {p: n if n in stored else f"params.{network}.{p}" for p, n in names.items()}
            arrays = storage.read(folder, {names[path]: spec for path, spec in wanted.items()}, partial=True)
            return {path: arrays[name] for path, name in names.items()}

        found = self._newest(read)
        if found is None:
            raise ConfigError(f"run = {str(self._run)!r}: it has no checkpoint yet")
        return found

    def _newest(self, read: Callable[[epath.Path], T]) -> T | None:
        """What `read` makes of the newest checkpoint that it can read; None if there is none."""
        failures = []
        for step in reversed(self.steps()):
            try:
                return read(self._directory / str(step))
            except storage.Damaged as error:
                failures.append(f"{step}: {error.why}")
                _log.warning("checkpoint %d cannot be read, trying the one before: %s", step, error.why)
        if failures:
            raise ConfigError(
                f"run: no checkpoint in {self._directory} can be read ({'; '.join(failures)}); choose another run "
                "directory, or remove it to start over"
            )
        return None

    def wait(self) -> None:
        """Blocks until what was saved is on disk. Raises SaveFailed."""
        if self._saving is None:
            return
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        if self._sealing is not None:
            self._sealing.finish()
            self._save_seconds = self._sealing.seconds
        self._saving = self._sealing = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._manager.is_saving_in_progress()

    @property
    def save_seconds(self) -> float | None:
        """Of the last save that is whole, from the call to the disk, in process 0; None before there is one."""
        now = None if self._sealing is None else self._sealing.seconds
        return self._save_seconds if now is None else now

    def close(self) -> None:
        if self._manager is not None:
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        """Lets what is being written become whole, unless another process is lost: it would be waited for."""
        if kind is None or not issubclass(kind, jax.errors.JaxRuntimeError):
            self.wait()
        if kind is None:
            self.close()

    def _making(self) -> contextlib.AbstractContextManager[None]:
        say = lambda why: ConfigError(f"run = {str(self._run)!r}: cannot be written ({why})")
        return storage.errors_as(say)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Errors while writing, of this thread or Orbax's own, as one line."""
        try:
            with storage.errors_as(self._failed):
                yield
        except SaveFailed:
            self._saving = self._sealing = None
            raise

    def _failed(self, why: str) -> SaveFailed:
        return SaveFailed(
            f"checkpoint {self._saving} could not be written to {self._directory}: {why}; the ones before it are "
            "whole: free space or mend the directory, then the same command resumes"
        )


class _Sealing:
    """Seals a checkpoint as soon as it is whole, in a thread: Orbax tells nobody.

    A run that is killed in between leaves a checkpoint without a seal, which is read all the same.
    """

    def __init__(self, folder: Any, began: float):
        self._folder, self._began, self._over = folder, began, threading.Event()
        self.seconds: float | None = None  # from `began` until it was whole
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(0.5) and not (self._folder / COMMITTED).exists():
            continue
        seconds = time.monotonic() - self._began
        try:
            if (self._folder / COMMITTED).exists():
                checksums.seal(self._folder)
                self.seconds = seconds
        except Exception as error:
            _log.warning("checkpoint %s has no seal: %s", self._folder, storage.reason(error))

    def finish(self) -> None:
        """Orbax is done: blocks until the seal is there."""
        self._over.set()
        self._thread.join()
