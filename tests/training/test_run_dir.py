"""A run's folder has one owner and one configuration, and a refusal is one line that leaves nothing behind."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.data.config import DataConfig, MixtureConfig
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.parallel.mesh import MeshConfig
from lingbot_jax.training import owner as owners
from lingbot_jax.training.config import CheckpointConfig, OptimizerConfig, Phase, TrainConfig, WatchdogConfig
from lingbot_jax.training.owner import Owner
from lingbot_jax.training.run_dir import init_run_dir, load_config
from lingbot_jax.worlds.config import WorldConfig
from lingbot_jax.worlds.open import write_bundle_config

ONE_LINE = r"^[^\n]+$"


def config(run, **fields) -> TrainConfig:
    world = WorldConfig(networks={"world": DiTConfig(dim=32, heads=2, layers=1, ffn=48)})
    small = {"run": str(run), "steps": 100, "codec": "codec", "world": world, "stage": "world"}
    return TrainConfig(**small | {"data": DataConfig(path="data")} | fields)


@pytest.fixture(autouse=True)
def sources(tmp_path, monkeypatch):
    """Two bundles that a relative path finds; with transformers, so that they are referred to and not copied."""
    monkeypatch.chdir(tmp_path)
    world = WorldConfig(networks={"world": DiTConfig(dim=32, heads=2, layers=1, ffn=48)})
    for name in ("codec", "elsewhere"):
        (tmp_path / name).mkdir()
        write_bundle_config(tmp_path / name, world)


def begin(made: TrainConfig) -> None:
    with init_run_dir(made):
        pass


def change(values, field: str, value):
    """A config with one field changed, by dotted path."""
    name, _, rest = field.partition(".")
    if isinstance(values, dict):
        return values | {name: change(values[name], rest, value) if rest else value}
    return dataclasses.replace(
        values, **{name: change(getattr(values, name), rest, value) if rest else value}
    )


@pytest.mark.parametrize(
    "field, value",
    [
        ("steps", 200),
        ("log_every", 3),
        ("checkpoint", CheckpointConfig(every=7)),
        ("watchdog", WatchdogConfig(step_seconds=7.0)),
        ("mesh", MeshConfig(fsdp=2, ulysses=1)),
        ("data.threads", 5),
        ("data.prefetch", 9),
        ("data.max_bad_records", 0),
        ("data.path", "elsewhere"),
        ("codec", "elsewhere"),
        ("world.networks.world.remat", "full"),
        ("curriculum", (Phase(end_step=500),)),
        ("curriculum", (Phase(end_step=100), Phase(end_step=500, frames=81))),
        ("curriculum", (Phase(end_step=100, mesh=MeshConfig(seq=2), path="other"),)),
    ],
)
def test_what_does_not_define_the_mathematics_may_change(tmp_path, field, value):
    begin(config(tmp_path / "run"))
    changed = change(config(tmp_path / "run"), field, value)
    begin(changed)
    assert load_config(tmp_path / "run").steps == changed.steps


@pytest.mark.parametrize(
    "field, value, named",
    [
        ("seed", 7, r"config.seed: \S+ has 0, this command 7; choose another run directory"),
        ("data.batch", 8, "config.data.batch: "),
        ("optimizer.learning_rate", 1e-3, "config.optimizer.learning_rate: "),
        ("world.networks.world.ffn", 64, "config.world.networks.world.ffn: "),
        ("curriculum", (Phase(end_step=100, frames=81),), "config.data.frames at step 0: "),
        (
            "curriculum",
            (Phase(end_step=50), Phase(end_step=200)),
            r"config.curriculum: \S+ has end_step \(\)",
        ),
    ],
)
def test_another_run_is_refused_in_the_same_folder(tmp_path, field, value, named):
    begin(config(tmp_path / "run"))
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(ConfigError, match=f"^{named}[^\n]*$"):
        begin(change(config(tmp_path / "run"), field, value))
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_of_a_mixture_paths_may_change_and_weights_not(tmp_path):
    def mixed(*parts: tuple[str, float]) -> TrainConfig:
        mixture = tuple(MixtureConfig(path=path, weight=weight) for path, weight in parts)
        return config(tmp_path / "run", data=DataConfig(path="data", mixture=mixture))

    begin(mixed(("more", 0.5)))
    assert load_config(tmp_path / "run").data.mixture[0].path == str(tmp_path / "more")
    begin(mixed(("elsewhere", 0.5)))
    for other in ((("more", 2.0),), (("more", 0.5), ("third", 1.0)), ()):
        with pytest.raises(ConfigError, match=r"^config.data.mixture\[[01]\].weight: \S+ has [^\n]*$"):
            begin(mixed(*other))


def test_cosine_decay_keeps_its_end(tmp_path):
    cosine = OptimizerConfig(decay="cosine")
    begin(config(tmp_path / "run", optimizer=cosine))
    with pytest.raises(ConfigError, match=r"^config.steps = 200: .* set config.optimizer.decay_steps = 100$"):
        begin(config(tmp_path / "run", optimizer=cosine, steps=200))
    begin(config(tmp_path / "run", optimizer=OptimizerConfig(decay="cosine", decay_steps=100), steps=200))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100000, b'{"steps": "x"}', None, "fifo"]
)
def test_damaged_config_is_one_line(tmp_path, content):
    begin(config(tmp_path / "run"))
    path = tmp_path / "run" / "config.json"
    path.unlink()
    if content is None:
        path.mkdir()
    elif content == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^run = '[^\n]*config.json[^\n]*$"):
        load_config(tmp_path / "run")
    with pytest.raises(ConfigError, match=ONE_LINE):
        begin(config(tmp_path / "run"))


def test_every_wrong_type_in_the_config_is_one_line(tmp_path):
    begin(config(tmp_path / "run"))
    path = tmp_path / "run" / "config.json"
    values = json.loads(path.read_text())
    for name in values:
        path.write_text(json.dumps(values | {name: [[]]}))
        with pytest.raises(ConfigError, match=r"^run = '[^\n]*$"):
            load_config(tmp_path / "run")


def test_paths_do_not_depend_on_the_working_directory_nor_on_where_the_run_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begin(config("run", init="high=a,low=gs://bucket/b"))
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    found = load_config(moved)
    assert found.run == str(moved) and found.data.path == str(tmp_path / "data")
    assert found.init == f"high={tmp_path}/a,low=gs://bucket/b"


def test_a_first_start_that_is_refused_late_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError, match="late"), init_run_dir(config(tmp_path / "new" / "run")) as run:
        (run.path / "checkpoints").mkdir()
        (run.path / "metrics.jsonl").write_text("")
        raise ConfigError("late")
    assert not (tmp_path / "new").exists()


def test_what_was_trained_stays_whatever_comes(tmp_path):
    with pytest.raises(ConfigError, match="late"), init_run_dir(config(tmp_path / "run")) as run:
        (run.path / "metrics.jsonl").write_text('{"step": 1}\n')
        raise ConfigError("late")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"metrics.jsonl", "config.json"}, "and the owner's file went"


@pytest.mark.parametrize("where", ["file", "/proc/none"])
def test_folder_that_cannot_be_written_is_one_line(tmp_path, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^run = '[^\n]*': cannot be written \([^\n]+\)$"):
        begin(config(tmp_path / where / "run"))


HOLD = """
import sys, time
from etils import epath
from lingbot_jax.training.owner import Owner
with Owner(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def hold(folder) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD, str(folder)]
    root = pathlib.Path(__file__).parents[2]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_trainer_is_refused_and_a_killed_one_replaced(tmp_path):
    made = config(tmp_path / "run")
    begin(made)
    process = hold(tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.name != "owner.json"}
    with pytest.raises(
        ConfigError, match=rf"^run = '\S+': process {process.pid} on \S+ is training it; [^\n]*$"
    ):
        begin(made)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.name != "owner.json"}
    process.kill()
    time.sleep(0.1)  # not waited for: a zombie is dead as well
    begin(made)
    process.wait()
    assert not (tmp_path / "run" / "owner.json").exists()


def elsewhere(folder, **fields) -> dict:
    """The record of an owner on another host."""
    record = {"token": "other", "host": "elsewhere", "pid": 1, "started": 1.0, "beat": time.time()} | fields
    (folder / "owner.json").write_text(json.dumps(record))
    return record


@pytest.fixture
def quick(monkeypatch):
    for name, seconds in {"BEAT": 0.05, "SILENCE": 0.4, "SETTLE": 0.1}.items():
        monkeypatch.setattr(owners, name, seconds)


def test_a_silent_owner_on_another_host_is_replaced(tmp_path, quick):
    elsewhere(tmp_path)
    with Owner(owners.epath.Path(tmp_path)) as owner:
        owner.check()
        assert json.loads((tmp_path / "owner.json").read_text())["pid"] == os.getpid()


def test_a_living_owner_on_another_host_is_not(tmp_path, quick, monkeypatch):
    elsewhere(tmp_path)
    sleep = time.sleep
    monkeypatch.setattr(owners.time, "sleep", lambda s: (sleep(s), elsewhere(tmp_path)))
    with (
        pytest.raises(ConfigError, match="process 1 on elsewhere is training it"),
        Owner(owners.epath.Path(tmp_path)),
    ):
        pass


def test_an_owner_that_was_replaced_hears_of_it(tmp_path, quick):
    with Owner(owners.epath.Path(tmp_path)) as owner:
        record = elsewhere(tmp_path)
        owner._thread.join(10)
        with pytest.raises(ConfigError, match="process 1 on elsewhere"):
            owner.check()
    assert json.loads((tmp_path / "owner.json").read_text()) == record, "it is not ours to remove"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": 1}'])
def test_a_damaged_owner_file_is_nobody(tmp_path, quick, content):
    (tmp_path / "owner.json").write_text(content)
    with Owner(owners.epath.Path(tmp_path)) as owner:
        owner.check()
