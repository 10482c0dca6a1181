"""A run that is killed, preempted, damaged or out of disk goes on as if nothing had happened."""

import dataclasses
import logging
import pathlib
import resource
import shutil
import signal

import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.models import params
from lingbot_jax.parallel import multihost
from lingbot_jax.training import run_dir
from lingbot_jax.training.config import CheckpointConfig, OptimizerConfig
from lingbot_jax.training.report import Report
from tests.training import kill_cycles, micro
from tests.training.test_experiment import restored

pytestmark = pytest.mark.long


def saved(config) -> list[int]:
    folder = pathlib.Path(config.run) / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def copy(whole, name, *steps):
    """The uninterrupted run, cut back to some of its checkpoints."""
    config = dataclasses.replace(whole, run=str(pathlib.Path(whole.run).with_name(name)))
    shutil.copytree(whole.run, config.run)
    for step in set(saved(config)) - set(steps):
        shutil.rmtree(pathlib.Path(config.run) / "checkpoints" / str(step))
    return config


def test_killed_run_repeats_the_uninterrupted_losses_bit_for_bit(folder, whole):
    """Killed in the first phase, around its end (step 6) and in the second; the long form: kill_cycles."""
    config = dataclasses.replace(whole, run=str(folder / "killed"))
    kill_cycles.check(config, micro.losses_of(whole), cycles=2, seed=1)


def test_a_retry_loop_through_three_sigterms_gives_the_uninterrupted_losses(
    folder, whole, monkeypatch, caplog, capsys
):
    """After its first step, later, and at the end of a phase; the loop ends with the run. And nothing is saved in a
    microsecond of grace: the run says so, once in every start that knows how long saving takes."""
    checkpoint = CheckpointConfig(every=2, every_minutes=None, grace_seconds=1e-6)
    config = dataclasses.replace(whole, run=str(folder / "retried"), steps=7, checkpoint=checkpoint)
    signals, later = [1, 3, 6], Report.later

    def preempt(self, step, *rest):
        later(self, step, *rest)
        if step in signals:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Report, "later", preempt)
    codes = []
    while not codes or codes[-1]:
        try:
            micro.train(config)
            codes.append(0)
        except SystemExit as ended:
            codes.append(ended.code)
            assert saved(config)[-1] == signals[len(codes) - 1], "the step it stopped after is saved"
    assert codes == [multihost.PREEMPTED] * 3 + [0] and multihost.PREEMPTED == 143
    assert capsys.readouterr().out.count("the same command resumes") == 3
    undisturbed = micro.losses_of(whole)
    assert micro.losses_of(config) == {step: undisturbed[step] for step in range(1, 8)}
    warnings = [r.getMessage() for r in caplog.records if "grace_seconds = 1e-06" in r.getMessage()]
    assert len(warnings) == 2, "of every start that saves twice"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "deleted"])
def test_damaged_checkpoint_is_passed_over_with_a_warning(whole, damage, caplog):
    config = copy(whole, damage, 8, 12)
    newest = pathlib.Path(config.run) / "checkpoints" / "12"
    files = sorted((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest = files[-1]
    if damage == "truncated":
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    elif damage == "flipped":
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    else:
        largest.unlink()
    with caplog.at_level(logging.WARNING):
        state = restored(config)
    assert int(state.step) == 8
    assert "checkpoint 12 cannot be read, trying the one before" in caplog.text


def test_run_goes_on_from_the_checkpoint_before_a_damaged_one(whole):
    config = copy(whole, "goes on", 8, 12)
    for path in (pathlib.Path(config.run) / "checkpoints" / "12").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    micro.train(config)
    assert micro.losses_of(config) == micro.losses_of(whole)
    assert 12 in saved(config), "the damaged one is replaced"
    ours, theirs = (params.arrays_of(micro.opened(c).networks["high"]) for c in (config, whole))
    assert all((ours[path] == theirs[path]).all() for path in theirs)


def test_when_every_checkpoint_is_damaged_one_line_says_so(whole):
    config = copy(whole, "all damaged", 8, 12)
    for path in (pathlib.Path(config.run) / "checkpoints").rglob("*"):
        if path.is_file() and "arrays" in path.parts:
            path.unlink()
    with pytest.raises(
        ConfigError, match=r"^run: no checkpoint in \S.* can be read \(12: .*8: .*\); [^\n]*$"
    ):
        micro.train(config)


def test_full_disk_stops_the_run_and_leaves_the_last_checkpoint_whole(whole):
    """No file may grow beyond 64 KiB, which the system reports where a checkpoint's data is written."""
    config = copy(whole, "full", 8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(
            ConfigError, match=r"^checkpoint 12 could not be written to \S.*/full/checkpoints: [^\n]*$"
        ) as e:
            micro.train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(e.value) and "the same command resumes" in str(e.value)
    assert saved(config) == [8]
    micro.train(config)  # there is room again
    assert micro.losses_of(config) == micro.losses_of(whole)


@pytest.mark.parametrize("where", ["run", "checkpoints"])
def test_directory_that_cannot_be_written_is_one_line(folder, whole, where):
    config = dataclasses.replace(whole, run=str(folder / f"no {where}"))
    path = pathlib.Path(config.run)
    if where == "run":
        path.write_text("a file where the run should be")
    else:
        path.mkdir()
        (path / "checkpoints").write_text("a file where they should be")
    with pytest.raises(ConfigError, match=r"^run = '[^\n]*': cannot be written \([^\n]*\)$"):
        micro.train(config)


def test_loss_that_is_not_finite_stops_the_run_and_saves_nothing_of_it(folder):
    optimizer = OptimizerConfig(learning_rate=10.0, warmup=0, clip=1e9)  # nothing survives it
    config = micro.config(folder, "explodes", optimizer=optimizer, steps=400, curriculum=())
    with pytest.raises(ConfigError, match=r"^(loss|grad_norm) = (nan|inf) at step \d+; [^\n]*$") as error:
        micro.train(config)
    assert "the batch was records " in str(error.value) and ":" in str(error.value).split("records ")[1]
    bad = int(str(error.value).split("at step ")[1].split(";")[0])
    assert all(step < bad for step in saved(config)), "nothing of the bad step is saved"


def test_another_configuration_is_refused_in_the_same_directory(whole):
    with pytest.raises(ConfigError, match=r"^config.seed [^\n]*choose another run directory[^\n]*$"):
        micro.train(dataclasses.replace(whole, seed=7))
    shifted = dataclasses.replace(whole.curriculum[0], shift=9.0)
    with pytest.raises(ConfigError, match="^config.flow.shift at step 0: "):
        micro.train(dataclasses.replace(whole, curriculum=(shifted, *whole.curriculum[1:])))
    assert run_dir.load_config(whole.run).seed == whole.seed


def test_a_run_that_is_moved_is_opened_and_goes_on(whole, tmp_path, monkeypatch):
    """Nothing in it is a path of the folder it was started in, and its codec is its own."""
    config = copy(whole, "stays", 8)
    moved = tmp_path / "elsewhere"
    shutil.move(config.run, moved)
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(config, run="elsewhere", codec="elsewhere/codec")
    micro.train(config)
    assert micro.losses(tmp_path, "elsewhere") == micro.losses_of(whole)
    assert set(micro.opened(config).networks) == {"high", "low"}
