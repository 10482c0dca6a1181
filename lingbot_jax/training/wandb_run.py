"""Metrics in Weights & Biases, beside TensorBoard: one W&B run for a run, however often it is started again."""

import importlib.util
import io
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from etils import epath
from pydantic import Field

from lingbot_jax.config import ConfigError, config
from lingbot_jax.files import is_remote, write_whole
from lingbot_jax.worlds import storage

_log = logging.getLogger(__name__)

ID = "wandb.json"  # in the run directory: {"id": of the W&B run}
Name = Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z._-]*$", max_length=128)]


@config
class WandbConfig:
    """Weights & Biases beside TensorBoard. The key and the mode are W&B's own: WANDB_API_KEY, WANDB_MODE=offline."""

    project: Name | None = Field(
        None, description="that metrics and samples go to as well; None: none. Needs the extra wandb"
    )
    entity: Name | None = Field(None, description="user or team of the project; None: the key's own")

    def check(self) -> None:
        """Raises ConfigError where the package is missing that the project needs."""
        if self.project is not None and importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                f"config.wandb.project = {self.project!r}: wandb is not installed: pip install -e '.[wandb]'"
            )


class WandbRun:
    """The W&B run of a run directory. Only process 0 has one.

    W&B cannot go back: after a resume the steps since the restored one come twice, with the same values. `step` is
    the axis, so that they lie on each other.
    """

    def __init__(self, run: Any, video: Callable[..., Any]):
        self._run, self._video = run, video
        run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def video(self, step: int, name: str, gif: bytes) -> None:
        self._run.log({"step": step, name: self._video(io.BytesIO(gif), format="gif")})

    def close(self) -> None:
        self._run.finish()


def open_wandb(run: str | os.PathLike, wandb: WandbConfig, described: Mapping[str, Any]) -> WandbRun | None:
    """The W&B run of a run directory, begun or gone on with; None: no project is named.

    Args:
      described: what W&B shows as the run's config.

    Raises:
      ConfigError: wandb is not installed, W&B refuses the run, or its id cannot be kept in the run directory.
    """
    if wandb.project is None:
        return None
    wandb.check()
    import wandb as library  # of an extra

    path = storage.located(run)
    folder = os.fspath(path)
    if is_remote(path):
        folder = tempfile.mkdtemp(prefix="wandb-")
        _log.warning("W&B writes to local folders alone: its files are in %s", folder)
    try:
        made = library.init(
            project=wandb.project,
            entity=wandb.entity,
            id=_id(path),
            resume="allow",
            name=path.name,
            dir=folder,
            config=dict(described),
            settings=library.Settings(console="off"),
        )
    except library.Error as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"config.wandb.project = {wandb.project!r}: {why}; give WANDB_API_KEY, or WANDB_MODE=offline"
        ) from None
    return WandbRun(made, library.Video)


def _id(run: epath.Path) -> str:
    """The id of the W&B run; made, and kept in the run directory, at the first start."""
    path = run / ID
    with storage.errors_as(lambda why: ConfigError(f"run: {path} cannot be read or written ({why})")):
        try:
            return str(json.loads(path.read_text())["id"])
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError):
            _log.warning("%s is damaged: W&B begins another run", path)
        made = uuid.uuid4().hex
        write_whole(path, json.dumps({"id": made}) + "\n")
        return made
