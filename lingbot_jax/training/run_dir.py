"""The folder of a run: who may write it (`owner.json`), and of which configuration it is (`config.json`).

A run is resumed by its own command. Between two starts anything may change that does not define the mathematics:
`MAY_CHANGE` is the list. All paths in config.json are absolute, and where the run itself lies is where it is found,
so that it can be opened from any folder and moved to another. A codec that lies alone (`experiments.fit_codec`) is
small and becomes the run's own, `codec/`; a whole bundle is referred to.
"""

import contextlib
import dataclasses
import fnmatch
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from lingbot_jax.config import ConfigError, build, flat
from lingbot_jax.files import copy_files, is_remote, whole_folder, write_whole
from lingbot_jax.parallel import multihost
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.training.owner import Owner
from lingbot_jax.worlds import storage
from lingbot_jax.worlds.open import BUNDLE, find
from lingbot_jax.worlds.world import CODEC

CONFIG = "config.json"

# Fields that a run may be resumed with other values of. Of the curriculum, phases beyond the steps that were planned.
MAY_CHANGE = (
    "run",  # where it lies
    "steps",  # but see `_check_decay`
    "log_every",
    "wandb",
    "checkpoint",
    "validation",
    "watchdog",
    "codec",  # where files lie: a run keeps its own copy, or `world` describes them
    "init",  # of no meaning once there is a checkpoint
    "teacher",
    "data.path",
    "data.mixture*.path",
    "data.threads",
    "data.prefetch",
    "data.max_bad_records",
    "mesh",  # of devices, and with it ulysses
    "world.networks.*.remat",
    "teachers.*.remat",
    "curriculum",  # compared by step, as the phases that it makes
)


@dataclasses.dataclass(frozen=True)
class RunDir:
    """A run that this job owns.

    Attributes:
      path: its folder. config: with absolute paths. owner: in process 0; `check_owner` before anything is saved.
    """

    path: epath.Path
    config: TrainConfig
    owner: Owner | None

    def check_owner(self) -> None:
        """Raises ConfigError in all processes where another job has taken the run over meanwhile."""
        with multihost.agree_on_errors():
            if self.owner is not None:
                self.owner.check()


@contextlib.contextmanager
def init_run_dir(config: TrainConfig) -> Iterator[RunDir]:
    """Owns the folder `config.run` as long as the block runs; all processes of a job enter it together.

    Writes config.json into a new run, or checks that an old one is the same run. A first start that ends with
    ConfigError before there is a checkpoint or a line of metrics leaves nothing behind.

    Raises:
      ConfigError: another configuration, another job that trains the run, or a folder that cannot be written.
    """
    config = with_absolute_paths(config)
    path = storage.located(config.run)
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        owner = codec = None
        with multihost.agree_on_errors():
            if first:
                if (path / CONFIG).exists():
                    check_same_run(load_config(path), config, path)
                with storage.errors_as(lambda why: _unwritable(config.run, why)):
                    stack.enter_context(_made(path))
                    owner = stack.enter_context(Owner(path))
                    stack.enter_context(_nothing_left_by_a_refusal(path))
                    if (path / CONFIG).exists():  # read again: the owner before may have made it meanwhile
                        check_same_run(load_config(path), config, path)
                    codec = _own_codec(path, config.codec)
                    values = dataclasses.asdict(config) | {"codec": codec}
                    write_whole(path / CONFIG, json.dumps(values, indent=2) + "\n")
        config = dataclasses.replace(config, codec=os.fspath(path / multihost.from_first(codec)))
        yield RunDir(path, config, owner)


def _own_codec(path: epath.Path, codec: str) -> str:
    """What config.json says of the codec: a path, or the run's own copy of one that lies alone."""
    own = path / CODEC
    if not (own / BUNDLE).exists():
        theirs = find(codec, "config.codec")
        if theirs.run or theirs.config.networks or theirs.config.text is not None:
            return codec
        with whole_folder(own, field="run") as folder:
            copy_files(theirs.path, folder)
    return CODEC


def load_config(run: str | os.PathLike) -> TrainConfig:
    """The configuration of a run; `config.run` is where it was found.

    Raises:
      ConfigError: no run there, or its config.json is damaged.
    """
    path = storage.located(run) / CONFIG
    say = f"run = {os.fspath(run)!r}"
    with storage.errors_as(lambda why: ConfigError(f"{say}: {CONFIG} cannot be read ({why})")):
        if not path.exists():
            raise ConfigError(f"{say}: no run directory ({CONFIG} is missing); experiments.train makes one")
        if not storage.is_file(path):
            raise ConfigError(f"{say}: {CONFIG} is not a file; restore it from a copy")
        values = _parse(path.read_bytes(), say)
    try:
        found = build(TrainConfig, values)
    except ConfigError as error:
        raise ConfigError(f"{say}: in {CONFIG}: {error}; restore it from a copy") from None
    codec = None if found.codec is None else os.fspath(path.parent / found.codec)
    return dataclasses.replace(found, run=os.fspath(path.parent), codec=codec)


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The config with every path independent of the working directory."""
    return with_paths(config, lambda path: os.fspath(storage.located(path)))


def with_paths(config: TrainConfig, place: Callable[[str], str]) -> TrainConfig:
    """The config with `place(path)` for each of its paths."""
    placed = lambda p: None if p is None else place(p)
    init = None
    if config.init is not None:  # SOURCE, or NAME=SOURCE,...
        parts = [part.rpartition("=") for part in config.init.split(",")]
        init = ",".join(f"{name}{sign}{place(source)}" for name, sign, source in parts)
    whole = lambda part: dataclasses.replace(part, path=placed(part.path))
    mixed = lambda parts: None if parts is None else tuple(map(whole, parts))
    data = dataclasses.replace(whole(config.data), mixture=mixed(config.data.mixture))
    phases = (dataclasses.replace(whole(phase), mixture=mixed(phase.mixture)) for phase in config.curriculum)
    return dataclasses.replace(
        config,
        run=place(config.run),
        codec=placed(config.codec),
        init=init,
        teacher=placed(config.teacher),
        data=data,
        curriculum=tuple(phases),
    )


def check_same_run(was: TrainConfig, now: TrainConfig, path: epath.Path) -> None:
    """Raises ConfigError unless `now` continues the run that `was` began: one line with the field and both values."""
    _check_decay(was, now, path)
    starts = {0, *(p.end_step for p in (*was.curriculum, *now.curriculum) if p.end_step < was.steps)}
    for step in sorted(starts):
        (i, old), (j, new) = _phase(was, step), _phase(now, step)
        if i != j:
            ends = [tuple(p.end_step for p in config.curriculum) for config in (was, now)]
            raise _differs("curriculum", f"end_step {ends[0]}", f"end_step {ends[1]}", path)
        old, new = _lasting(old), _lasting(new)
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                at = f" at step {step}" if was.curriculum or now.curriculum else ""
                raise _differs(f"{name}{at}", repr(old.get(name)), repr(new.get(name)), path)


def _check_decay(was: TrainConfig, now: TrainConfig, path: epath.Path) -> None:
    ends = [c.optimizer.decay_steps or c.steps for c in (was, now)]
    if was.optimizer.decay == now.optimizer.decay == "cosine" and ends[0] != ends[1]:
        raise ConfigError(
            f"config.steps = {now.steps}: {path} has {was.steps}, and its cosine decay ends at step {ends[0]}; set "
            f"config.optimizer.decay_steps = {ends[0]}"
        )


def _phase(config: TrainConfig, step: int) -> tuple[int, TrainConfig]:
    """The phase that a step is in, and the run as it sees it; the last one has no end."""
    before = [p for p in config.curriculum[:-1] if p.end_step <= step]
    return len(before), config.phases()[len(before)]


def _lasting(config: TrainConfig) -> dict[str, Any]:
    """The fields that define the mathematics, by dotted path."""
    found = dict(flat(dataclasses.asdict(config)))
    found["optimizer.decay_steps"] = None  # of this `_check_decay` knows
    changes = lambda name: any(
        fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"{p}.*") for p in MAY_CHANGE
    )
    return {name: value for name, value in found.items() if not changes(name)}


def _differs(field: str, was: str, now: str, path: epath.Path) -> ConfigError:
    return ConfigError(f"config.{field}: {path} has {was}, this command {now}; choose another run directory")


def _unwritable(run: str, why: str) -> ConfigError:
    return ConfigError(f"run = {run!r}: cannot be written ({why})")


def _parse(content: bytes, say: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        why = str(error).splitlines()[0][:100]
        raise ConfigError(f"{say}: {CONFIG} is damaged ({why}); restore it from a copy") from None


@contextlib.contextmanager
def _made(path: epath.Path) -> Iterator[None]:
    """Makes a folder, and after a refusal removes what it made of it, if that is empty. Object stores have none."""
    if is_remote(path):
        yield
        return
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except ConfigError:
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


@contextlib.contextmanager
def _nothing_left_by_a_refusal(path: epath.Path) -> Iterator[None]:
    """Removes what a first start put into its folder if it ends with ConfigError before anything was trained."""
    list_folder = lambda: list(path.iterdir()) if path.exists() else []
    there = {entry.name for entry in list_folder()}
    try:
        yield
    except ConfigError:
        lines = path / "metrics.jsonl"
        trained = storage.is_file(lines) and lines.stat().length > 0 or _steps(path)
        if CONFIG not in there and not trained:
            for entry in [entry for entry in list_folder() if entry.name not in there]:
                entry.rmtree() if entry.is_dir() else entry.unlink()
        raise


def _steps(path: epath.Path) -> list[str]:
    folder = path / "checkpoints"
    return [p.name for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
