"""The stream of windows: whole epochs, no record twice, the same again after restoring, faults named."""

import json
import logging

import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.data.loader import LoaderConfig, TrainLoader, evaluation_batches
from lingbot_jax.data.records import DataError
from tests.data.clips import make_clip, make_data

CLIPS, FRAMES = 12, 9  # clip n is filled with 16 n + frame


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_data(folder, CLIPS, shards=2, frames=FRAMES)
    make_data(folder, 5, shards=1, frames=FRAMES, split="held_out")
    return folder


def config(folder, **fields):
    return LoaderConfig(**{"path": str(folder), "frames": 5, "batch": 4, "seed": 7, **fields})


def take(loader, batches):
    return [next(loader)["record_ids"].tolist() for _ in range(batches)]


def test_windows_are_what_their_ids_say(folder):
    batch = next(TrainLoader(config(folder)))
    assert batch["frames"].shape == (4, 5, 6, 8, 3) and batch["frames"].dtype == np.uint8
    assert batch["keys"].shape == (4, 5, 8) and batch["c2w"].shape == (4, 5, 4, 4)
    for b, name in enumerate(batch["record_ids"]):
        shard, index, start = name.split(":")
        clip = make_clip(int(shard.split("-")[1]) * CLIPS // 2 + int(index), FRAMES)
        cut = slice(int(start), int(start) + 5)
        np.testing.assert_array_equal(batch["frames"][b], clip.frames[cut])
        np.testing.assert_array_equal(batch["keys"][b, 1:], clip.keys[cut][1:])
        np.testing.assert_array_equal(batch["c2w"][b], clip.c2w[cut])
        np.testing.assert_array_equal(batch["intrinsics"][b], clip.intrinsics[cut])
    assert not batch["keys"][:, 0].any()
    assert batch["narrative"].tolist() == ["A walk."] * 4


def test_every_epoch_has_every_record_once_and_differs(folder):
    loader = TrainLoader(config(folder))
    epochs = [sum(take(loader, CLIPS // 4), []) for _ in range(3)]
    orders = [[name.rsplit(":", 1)[0] for name in epoch] for epoch in epochs]
    assert all(len(set(order)) == CLIPS for order in orders)
    assert orders[0] != orders[1] != orders[2]
    windows = [dict(name.rsplit(":", 1) for name in epoch) for epoch in epochs]
    assert windows[0] != windows[1] != windows[2], "another epoch is other windows"
    starts = {int(name.rsplit(":", 1)[1]) for epoch in epochs for name in epoch}
    assert starts == set(range(FRAMES - 5 + 1)), "windows begin everywhere"


def test_processes_share_every_epoch(folder):
    loaders = [TrainLoader(config(folder, batch=2), process=(p, 3)) for p in range(3)]
    for _ in range(2):
        epoch = sum((sum(take(loader, 2), []) for loader in loaders), [])
        assert len({name.rsplit(":", 1)[0] for name in epoch}) == CLIPS


def test_order_depends_on_the_seed_only(folder):
    first = take(TrainLoader(config(folder, threads=0)), 5)
    assert first == take(TrainLoader(config(folder, threads=2, prefetch=1)), 5)
    assert first != take(TrainLoader(config(folder, seed=8)), 5)


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_restoring_repeats_the_stream(folder, taken):
    loader = TrainLoader(config(folder))
    take(loader, taken)
    state = json.loads(json.dumps(loader.get_state()))
    ahead = take(loader, 6)
    again = TrainLoader(config(folder))
    take(again, 2)
    again.set_state(state)
    assert take(again, 6) == ahead


def test_state_of_other_data_is_refused(folder):
    state = TrainLoader(config(folder)).get_state()
    with pytest.raises(DataError, match=r"^data.seed = 8: the checkpoint was made with 7"):
        TrainLoader(config(folder, seed=8)).set_state(state)
    with pytest.raises(DataError, match="data.records = 5: the checkpoint was made with 12"):
        TrainLoader(config(folder), split="held_out").set_state(state)


def test_transform_gets_batches(folder):
    loader = TrainLoader(
        config(folder), transform=lambda b: b | {"mean": b["frames"].mean(axis=(1, 2, 3, 4))}
    )
    batch = next(loader)
    np.testing.assert_allclose(batch["mean"], batch["frames"].mean(axis=(1, 2, 3, 4)))


def test_evaluation_is_every_clip_once_in_order(folder):
    batches = list(evaluation_batches(config(folder)))
    assert [len(b["record_ids"]) for b in batches] == [4, 1]
    names = sum((b["record_ids"].tolist() for b in batches), [])
    assert names == [f"held_out-00000-of-00001:{i}:0" for i in range(5)]
    assert sum(len(b["record_ids"]) for b in evaluation_batches(config(folder), clips=3)) == 3


def test_damage_is_skipped_up_to_the_limit(tmp_path, caplog):
    paths = make_data(tmp_path, CLIPS, shards=2, frames=FRAMES)
    blob = bytearray(paths[1].read_bytes())
    for number in (6, 9):
        blob[blob.find(bytes([(16 * number + 5) % 256]) * 100) + 50] ^= 0xFF
    paths[1].write_bytes(blob)
    with caplog.at_level(logging.WARNING):
        names = sum(take(TrainLoader(config(tmp_path, skip_limit=2)), 5), [])
    records = [name.rsplit(":", 1)[0] for name in names[:10]]
    assert len(set(records)) == 10 and not {"train-00001-of-00002:0", "train-00001-of-00002:3"} & set(records)
    assert "skipped train-00001-of-00002:0" in caplog.text and "train-00001-of-00002:3" in caplog.text
    with pytest.raises(DataError, match=r"train-00001-of-00002:\d: Corrupted .* 2 faults, the limit"):
        take(TrainLoader(config(tmp_path, skip_limit=1)), 5)


def test_short_clips_are_faults(folder):
    with pytest.raises(DataError, match=r"train-.* has 9 frames: cannot give 13 .*limit \(skip_limit\) is 0"):
        next(TrainLoader(config(folder, frames=13, skip_limit=0)))


def test_only_faults_end_whatever_the_limit(folder):
    with pytest.raises(DataError, match="12 faults, the limit"):
        next(TrainLoader(config(folder, frames=13, skip_limit=100)))


def test_bad_settings_and_folders(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"data.frames = 6: must be 4n\+1"):
        config(folder, frames=6)
    with pytest.raises(DataError, match="no shard train-"):
        TrainLoader(config(tmp_path))
    with pytest.raises(DataError, match="12 clips for 1 processes x data.batch = 16"):
        TrainLoader(config(folder, batch=16))
