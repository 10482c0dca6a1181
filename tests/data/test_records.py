"""Shards appear whole or not at all, and damage is named, skipped and counted."""

import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest

from lingbot_jax.data.records import DataError, ErrorBudget, Records, find_shards, shard_name, write_shard
from lingbot_jax.data.schema import decode
from tests.data.clips import make_data


def test_round_trip_in_order(tmp_path):
    make_data(tmp_path, clips=6, shards=2)
    records = Records(find_shards(tmp_path, "train"), ErrorBudget(0))
    assert [decode(records[i]).clip_id for i in range(len(records))] == [f"train-{n}" for n in range(6)]
    assert records.name(4) == "train-00001-of-00002:1"


def test_interrupted_write_leaves_nothing(tmp_path):
    def records():
        yield b"one"
        raise KeyboardInterrupt

    path = tmp_path / shard_name("train", 0, 1)
    with pytest.raises(KeyboardInterrupt):
        write_shard(path, records(), "uncompressed")
    assert list(tmp_path.iterdir()) == []


def test_killed_write_leaves_nothing_that_is_read(tmp_path):
    program = (
        "import os, pathlib; from lingbot_jax.data.records import write_shard\n"
        f"path = pathlib.Path({str(tmp_path)!r}) / 'train-00000-of-00001.array_record'\n"
        "def records():\n"
        "    for i in range(300): yield b'x' * 10000\n"
        "    os.kill(os.getpid(), 9)\n"
        "write_shard(path, records(), 'uncompressed')\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == -9
    with pytest.raises(DataError, match="no shard train-"):
        find_shards(tmp_path, "train")
    make_data(tmp_path, clips=2, shards=1)  # also sweeps what is left of the other
    assert [p.name for p in tmp_path.iterdir()] == ["train-00000-of-00001.array_record"]


def test_missing_shards_are_named(tmp_path):
    paths = make_data(tmp_path, clips=4, shards=2)
    paths[1].unlink()
    with pytest.raises(DataError, match="train-00001-of-00002.array_record is missing"):
        find_shards(tmp_path, "train")
    make_data(tmp_path, clips=3, shards=3)
    with pytest.raises(DataError, match="shards of two data sets"):
        find_shards(tmp_path, "train")


def _damage(blob: bytes, kind: str) -> bytes:
    middle = len(blob) // 2
    return {
        "cut in the middle": blob[:middle],
        "cut at the end": blob[:-100],
        "empty": b"",
        "zeros": b"\0" * len(blob),
        "foreign": b"hello world " * 5000,
        "two bytes": b"hi",
    }[kind]


@pytest.mark.parametrize(
    "kind", ["cut in the middle", "cut at the end", "empty", "zeros", "foreign", "two bytes"]
)
def test_a_shard_that_is_no_shard(tmp_path, kind, caplog):
    paths = make_data(tmp_path, clips=6, shards=2)
    paths[0].write_bytes(_damage(paths[0].read_bytes(), kind))
    shards = find_shards(tmp_path, "train")
    with pytest.raises(DataError, match=r"^train-00000-of-00002.array_record: not a whole ArrayRecord file"):
        Records(shards, ErrorBudget(0))
    with caplog.at_level(logging.WARNING):
        records = Records(shards, ErrorBudget(1))
    assert "replaced train-00000-of-00002.array_record" in caplog.text
    assert [decode(records[i]).clip_id for i in range(len(records))] == ["train-3", "train-4", "train-5"]
    paths[1].write_bytes(_damage(paths[1].read_bytes(), kind))
    with pytest.raises(DataError, match="no shard holds a readable record"):
        Records(shards, ErrorBudget(2))


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path.parent / "nowhere")],
    ids=["fifo", "folder", "link"],
)
def test_what_is_no_regular_file_is_a_fault_and_no_wait(tmp_path, make, caplog):
    paths = make_data(tmp_path, clips=6, shards=2)
    paths[0].unlink()
    make(paths[0])
    records = Records(find_shards(tmp_path, "train"), ErrorBudget(1))
    assert len(records) == 3 and "replaced train-00000-of-00002.array_record" in caplog.text


@pytest.mark.parametrize("promised", [3, None, "three", -1, 10**30])
def test_a_lost_shard_keeps_its_places(tmp_path, promised):
    """Where dataset.json knows how many they are: the order of the others must not change."""
    paths = make_data(tmp_path, clips=6, shards=2)
    shards = {paths[0].name: {"clips": promised}}
    (tmp_path / "dataset.json").write_text(json.dumps({"splits": {"train": {"shards": shards}}}))
    paths[0].write_bytes(b"")
    records = Records(find_shards(tmp_path, "train"), ErrorBudget(1))
    lost = 3 if promised == 3 else 0
    assert (len(records), records.readable) == (3 + lost, 3)
    assert [records[i] is None for i in range(len(records))] == [True] * lost + [False] * 3
    assert records.name(lost) == "train-00001-of-00002:0"


def test_flipped_bytes_name_shard_and_index(tmp_path, caplog):
    (path,) = make_data(tmp_path, clips=4, shards=1)
    blob = bytearray(path.read_bytes())
    place = blob.find(bytes([16 * 2 + 5]) * 100)  # pixels of clip 2, frame 5
    assert place > 0
    blob[place + 50] ^= 0xFF
    path.write_bytes(blob)
    damage = ErrorBudget(1)
    records = Records([path], damage)
    with caplog.at_level(logging.WARNING):
        read = [records[i] for i in range(4)]
    assert [r is None for r in read] == [False, False, True, False]
    assert "replaced train-00000-of-00001:2: Corrupted" in caplog.text
    assert records[2] is None, "the same fault counts once"
    with pytest.raises(
        DataError, match=r"^train-00000-of-00001:3: .* 2 bad records, config.data.max_bad_records = 1"
    ):
        damage.report("train-00000-of-00001:3", "bad")


def test_no_byte_flip_crashes_the_reader(tmp_path):
    """Flips over the whole file, in a process of its own: it must never abort, only report."""
    (path,) = make_data(tmp_path, clips=3, shards=1)
    blob = path.read_bytes()
    program = (
        "import sys, pathlib, numpy as np; from lingbot_jax.data.records import *\n"
        "path = pathlib.Path(sys.argv[1]); blob = path.read_bytes(); rng = np.random.default_rng(0)\n"
        "places = [*range(64), *rng.integers(0, len(blob), 150).tolist(), *range(len(blob) - 64, len(blob))]\n"
        "good = 0\n"
        "for place in places:\n"
        "    bad = bytearray(blob); bad[place] ^= 1 << int(rng.integers(8)); path.write_bytes(bad)\n"
        "    try:\n"
        "        records = Records([path], ErrorBudget(9))\n"
        "        good += all(records[i] is not None for i in range(len(records)))\n"
        "    except DataError as error:\n"
        "        assert '\\n' not in str(error)\n"
        "print(len(places), good)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    tried, good = map(int, run.stdout.split())
    assert tried == 278
    assert good < tried, "padding may flip unseen, data may not"
    assert np.frombuffer(blob, np.uint8).size > 0
