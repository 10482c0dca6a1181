"""Checkpoints of a run: parameters, EMA, optimiser, loader state and config, written asynchronously by Orbax.

Orbax writes a step into a temporary directory and renames it when it is whole, so a run killed mid-write leaves
the checkpoint before it. A finished step whose files were damaged later is reported and passed over: Orbax notices
what is missing or cut, and a digest of the values, kept beside them, notices flipped bytes.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from lingbot_jax.config import ConfigError, build
from lingbot_jax.models import params
from lingbot_jax.parallel import sharding
from lingbot_jax.training.config import CheckpointConfig, TrainConfig
from lingbot_jax.training.state import Arrays, TrainState, abstract_model, abstract_state

_log = logging.getLogger(__name__)


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; those before it are whole. The message is one line for the user."""


class Checkpoints:
    """The checkpoints of one run directory; `read_only` leaves those that another process is writing alone."""

    def __init__(self, run: str | pathlib.Path, config: CheckpointConfig, read_only: bool = False):
        """Raises ConfigError: the directory cannot be made."""
        self._directory = pathlib.Path(run).absolute() / "checkpoints"
        if not read_only:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"run = {str(run)!r}: cannot be written ({error.strerror})") from None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else config.keep,
            save_interval_steps=0 if read_only else 1,
            create=not read_only,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=not read_only,  # what a killed run left half written
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._saving: int | None = None

    def save(self, step: int, state: TrainState, loader: dict[str, Any]) -> None:
        """Starts writing; returns once the values have left the device, so the state may be donated.

        Raises:
          SaveFailed: this one cannot be begun, or the one before it could not be written.
        """
        self.wait()
        self._saving = step
        fields = _fields(state)
        extra = {"loader": loader, "digests": {name: int(d) for name, d in _digests(fields).items()}}
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(fields), extra=ocp.args.JsonSave(extra))
        with self._writing():
            if step in self._manager.all_steps():  # a damaged one, which `restore` passed over
                self._manager.delete(step)
            self._manager.save(step, args=items, force=True)

    def restore(self, template: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest whole checkpoint, on the shardings of `template` (ShapeDtypeStructs); None if there is none.

        Raises:
          ConfigError: there are checkpoints and none of them can be read.
        """
        found = self.restore_fields(_fields(template))
        return found and (TrainState(**found[0]), found[1])

    def restore_fields(self, template: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """As `restore`, for some fields of the state only: the others are not read."""
        failures = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self._restore(step, template)
            except Exception as error:  # Orbax and TensorStore raise many types for damaged files
                reason = _reason(error)
                failures.append(f"{step}: {reason}")
                _log.warning("checkpoint %d cannot be read, trying the one before: %s", step, reason)
        if failures:
            raise ConfigError(
                f"run: no checkpoint in {self._directory} can be read ({'; '.join(failures)}); choose another run "
                "directory, or remove it to start over"
            )
        return None

    def _restore(self, step: int, template: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        restore_args = ocp.checkpoint_utils.construct_restore_args(template)
        state = ocp.args.PyTreeRestore(template, restore_args=restore_args, partial_restore=True)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=state, extra=ocp.args.JsonRestore())
        )
        for name, digest in _digests(restored.state).items():
            if int(digest) != restored.extra["digests"][name]:
                raise ValueError(
                    f"the values of {name} do not match their digest: the files were changed after writing"
                )
        return restored.state, restored.extra["loader"]

    def wait(self) -> None:
        """Blocks until what was saved is on disk. Raises SaveFailed."""
        if self._saving is not None:
            with self._writing():
                self._manager.wait_until_finished()
                self._manager.check_for_errors()

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        """Lets what is being written become whole, unless another process is lost: it would be waited for."""
        if kind is None or not issubclass(kind, jax.errors.JaxRuntimeError):
            self.wait()
        if kind is None:
            self.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Errors while writing, of this thread or Orbax's own, as one line."""
        try:
            yield
        except jax.errors.JaxRuntimeError:  # another process is gone: not the disk's fault
            raise
        except Exception as error:  # Orbax and TensorStore raise many types for what a disk refuses
            step, self._saving = self._saving, None
            raise SaveFailed(
                f"checkpoint {step} could not be written to {self._directory}: {_reason(error)}; the ones before it "
                "are whole: free space or mend the directory, then the same command resumes"
            ) from error


def load_ema(run: str | pathlib.Path, mesh: Mesh | None = None) -> Arrays:
    """All parameters of a run, averaged where they were trained, from its newest checkpoint.

    Args:
      mesh: if given, every parameter is read into its place on it.

    Raises:
      ConfigError: no run or no checkpoint there.
    """
    config = load_config(run)
    state = abstract_state(config)
    fields = {"ema": state.ema, "frozen": state.frozen}
    if mesh is not None:
        axes = params.logical_axes(abstract_model(config))
        fields = sharding.specs(fields, sharding.shardings_by_path(fields, axes, mesh))
    checkpoints = Checkpoints(run, config.checkpoint, read_only=True)
    found = checkpoints.restore_fields(fields)
    checkpoints.close()
    if found is None:
        raise ConfigError(f"run = {str(run)!r}: it has no checkpoint yet")
    return found[0]["ema"] | found[0]["frozen"]


def load_config(run: str | pathlib.Path) -> TrainConfig:
    """The configuration a run directory was made with. Raises ConfigError."""
    path = pathlib.Path(run) / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"run = {str(run)!r}: no run directory (config.json is missing); experiments.train makes one"
        )
    return build(TrainConfig, json.loads(path.read_text()))


def _reason(error: BaseException) -> str:
    """An error in a few words: where a system call failed, the system's (`No space left on device`)."""
    found = re.search(r"(?:OS error |os_error_code='|Errno )(\d+)", str(error))  # of TensorStore, of Python
    text = os.strerror(int(found[1])) if found else str(error) or type(error).__name__
    return text.strip().splitlines()[0][:160]


def _fields(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


@jax.jit
def _digests(fields: dict[str, Any]) -> dict[str, jax.Array]:
    return {name: _digest(tree) for name, tree in fields.items()}


def _digest(tree: Any) -> jax.Array:
    """A 32-bit digest of all bits. Integer sums wrap and commute, so it does not depend on the sharding."""
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        bits = jnp.uint16 if leaf.dtype.itemsize == 2 else jnp.uint32
        words = jax.lax.bitcast_convert_type(leaf, bits).astype(jnp.uint32)
        # An odd weight per position along every axis: any flipped bit changes the sum.
        for axis, size in enumerate(words.shape):
            index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
            words = words * (2 * (index + jnp.uint32(size)) * jnp.uint32(0x9E3779B1) + jnp.uint32(1))
        total = total * jnp.uint32(0x01000193) + words.sum(dtype=jnp.uint32)
    return total
