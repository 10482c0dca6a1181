"""Checkpoints are restored whole or passed over with a warning, whatever happens to their files."""

import logging
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.worlds.checkpoints import Checkpoints, SaveFailed


def state(step: int, size: int = 6):
    """A tree like the training state, with an optimiser's own structure inside."""
    rng = np.random.default_rng(step)
    arrays = {
        "blocks.up.kernel": jnp.asarray(rng.normal(size=(2, size, 3)), jnp.float32),
        "bias": jnp.ones(3),
    }
    return {
        "step": jnp.int32(step),
        "params": {"world": arrays},
        "ema": {"world": {"bias": 2 * arrays["bias"]}},
        "opt": {"world": optax.adamw(1e-3).init(arrays)},
    }


TEMPLATE = jax.eval_shape(lambda: state(0))


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    with Checkpoints(run, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step))
    return run


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def restore(run, template=TEMPLATE):
    return Checkpoints(run, read_only=True).restore(template)


def test_newest_comes_back_and_old_ones_go(run):
    assert sorted(p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit()) == ["2", "3"]
    assert (run / "checkpoints" / "3" / "seal.json").is_file()
    assert_equal(restore(run), state(3))


def test_averages_stand_in_for_what_they_average(run):
    wanted = TEMPLATE["params"]["world"]
    found = Checkpoints(run, read_only=True).averaged("world", wanted)
    params, ema = state(3)["params"]["world"], state(3)["ema"]["world"]
    assert ema and ema.keys() < params.keys()
    assert_equal(found, params | ema)


def test_no_checkpoint_is_none_and_reading_makes_no_folder(tmp_path):
    assert restore(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


def test_other_arrays_are_one_line_and_no_damage(run, caplog):
    other = TEMPLATE | {"params": {"world": {"bias": jax.ShapeDtypeStruct((4,), jnp.float32)}}}
    with pytest.raises(ConfigError, match=r"misshapen params.world.bias \[3\], needs \[4\]$"):
        restore(run, other)
    assert not caplog.text


def test_a_bit_flipped_in_any_file_brings_the_checkpoint_before_with_a_warning(run, caplog):
    newest = run / "checkpoints" / "3"
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) > 20
    for number, path in enumerate(files):
        whole = path.read_bytes()
        for place in sorted({0, len(whole) // 2, len(whole) - 1}):
            data = bytearray(whole)
            data[place] ^= 1 << (number + place) % 8
            path.write_bytes(data)
            caplog.clear()
            assert_equal(restore(run), state(2))
            assert "checkpoint 3 cannot be read, trying the one before: " in caplog.text, (path, place)
        path.write_bytes(whole)
    assert_equal(restore(run), state(3))


@pytest.mark.parametrize("damage", ["cut", "gone", "empty"])
def test_a_file_that_is_cut_gone_or_empty_brings_the_checkpoint_before(run, damage):
    newest = run / "checkpoints" / "3"
    for path in [p for p in newest.rglob("*") if p.is_file() and p.name != "seal.json"]:
        whole = path.read_bytes()
        path.unlink() if damage == "gone" else path.write_bytes(
            whole[: len(whole) // 2 if damage == "cut" else 0]
        )
        assert_equal(restore(run), state(2))
        path.write_bytes(whole)


def test_a_damaged_checkpoint_is_replaced_when_the_run_comes_by_again(run):
    for path in (run / "checkpoints" / "3").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with Checkpoints(run, keep=2) as checkpoints:
        assert_equal(checkpoints.restore(TEMPLATE), state(2))
        checkpoints.save(3, state(7))
    assert_equal(restore(run), state(7))


def test_when_none_can_be_read_one_line_says_so(run):
    for path in (run / "checkpoints").rglob("[0-9].[0-9]*"):
        path.unlink()
    with pytest.raises(
        ConfigError, match=r"^run: no checkpoint in \S+ can be read \(3: .*2: [^\n]*\); [^\n]*$"
    ):
        restore(run)


def test_a_kill_between_commit_and_seal_loses_nothing(run, caplog):
    (run / "checkpoints" / "3" / "seal.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert_equal(restore(run), state(3))
    assert "cannot be read" not in caplog.text


def test_full_disk_is_one_line_and_leaves_the_checkpoints_before(run):
    """No file may grow beyond 64 KiB, which the system reports where a checkpoint's data is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(run, keep=2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(SaveFailed, match=r"^checkpoint 4 could not be written to \S+: [^\n]*$") as error:
            checkpoints.save(4, state(4, size=20000))
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(error.value) and "the same command resumes" in str(error.value)
    assert_equal(restore(run), state(3))


def test_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "run").write_text("a file where the run should be")
    with pytest.raises(ConfigError, match=r"^run = '[^\n]*': cannot be written \([^\n]*\)$"):
        Checkpoints(tmp_path / "run")
