"""What is written appears whole or not at all; what killed processes left is swept; object stores work the same."""

import os
import signal
import subprocess
import sys

import pytest
from etils import epath

from lingbot_jax import files
from lingbot_jax.config import ConfigError


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    files.write_whole(path, "é")
    files.write_whole(path, b"2")
    assert path.read_bytes() == b"2"
    with pytest.raises(KeyboardInterrupt), files.whole_file(path) as partial:
        partial.write_bytes(b"half")
        assert path.read_bytes() == b"2"
        raise KeyboardInterrupt
    assert path.read_bytes() == b"2" and os.listdir(tmp_path) == ["a.json"]


def test_a_folder_that_cannot_be_written_to_is_found_before_the_work(tmp_path):
    with pytest.raises(OSError), files.whole_file(tmp_path / "none" / "a"):
        pytest.fail("the block ran")
    (tmp_path / "file").write_text("")
    for out in ("none/out", "file/out", "file", "."):
        refused = pytest.raises(ConfigError, match=r"^--out = '")
        with refused as caught, files.whole_folder(tmp_path / out, field="--out"):
            pytest.fail("the block ran")
        assert "\n" not in str(caught.value)


def test_a_folder_is_whole_or_gone(tmp_path):
    with pytest.raises(RuntimeError), files.whole_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("a")
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with files.whole_folder(tmp_path / "out") as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "a").write_text("a")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "deep" / "a").read_text() == "a" and os.listdir(tmp_path) == ["out"]


def test_a_full_disk_is_refused(tmp_path):
    refused = pytest.raises(ConfigError, match=r"^out = .*: needs 1000000000\.0 GB, and .* are free there")
    with refused, files.whole_folder(tmp_path / "out", nbytes=10**18):
        pytest.fail("the block ran")
    assert os.listdir(tmp_path) == []


def test_leftovers_of_dead_processes_are_swept_and_no_others(tmp_path):
    program = (
        "import os, sys; from lingbot_jax import files\n"
        "with files.whole_folder(sys.argv[1] + '/out') as a, files.whole_file(sys.argv[1] + '/b') as b:\n"
        "    (a / 'x').write_text('x'); print('written', flush=True); sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == b"written\n"
    (tmp_path / ".c.elsewhere-1.partial").write_text("another host's")
    files.write_whole(tmp_path / "d", "d")
    assert len(os.listdir(tmp_path)) == 4, "a living process keeps what it writes"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    files.write_whole(tmp_path / "d", "d")
    assert sorted(os.listdir(tmp_path)) == [".c.elsewhere-1.partial", "d"]


def test_the_same_in_an_object_store(bucket):
    files.write_whole(f"{bucket}/a.json", "one")
    files.write_whole(f"{bucket}/a.json", "two")
    assert epath.Path(f"{bucket}/a.json").read_text() == "two"
    with pytest.raises(RuntimeError), files.whole_folder(f"{bucket}/out") as folder:
        (folder / "a").write_text("a")
        raise RuntimeError
    assert not epath.Path(f"{bucket}/out").exists()
    with files.whole_folder(f"{bucket}/out") as folder:
        (folder / "a").write_text("a")
    assert (epath.Path(f"{bucket}/out") / "a").read_text() == "a"
    with (
        pytest.raises(ConfigError, match="^out = 'gs://.*/out': exists"),
        files.whole_folder(f"{bucket}/out"),
    ):
        pytest.fail("the block ran")


def test_a_store_that_cannot_be_reached_is_one_line(broken_bucket):
    refused = pytest.raises(ConfigError, match=r"^--out = 'gs://broken/out': no such bucket: broken$")
    with refused, files.whole_folder(f"{broken_bucket}/out", field="--out"):
        pytest.fail("the block ran")
