"""Batches are a function of (seed, step): whatever the process, the threads, the start and the damage met before."""

import logging

import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.data.config import DataConfig
from lingbot_jax.data.crops import crops
from lingbot_jax.data.loader import BatchStream, Dataset
from lingbot_jax.data.records import DataError, shard_name, write_shard
from lingbot_jax.data.schema import encode
from lingbot_jax.files import write_whole
from tests.data.clips import make_clip, make_data

CLIPS, FRAMES = 12, 9  # clip n is filled with 16 n + frame


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_data(folder, CLIPS, shards=2, frames=FRAMES)
    make_data(folder, 5, shards=1, frames=FRAMES, split="held_out")
    return folder


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Clips 6 and 9 have a flipped byte, clip 2 is too short."""
    folder = tmp_path_factory.mktemp("damaged")
    clips = [make_clip(n, 3 if n == 2 else FRAMES) for n in range(CLIPS)]
    paths = [folder / shard_name("train", k, 2) for k in range(2)]
    for path, part in zip(paths, (clips[:6], clips[6:]), strict=True):
        write_shard(path, map(encode, part), "uncompressed")
    blob = bytearray(paths[1].read_bytes())
    for number in (6, 9):
        blob[blob.find(bytes([(16 * number + 5) % 256]) * 100) + 50] ^= 0xFF
    paths[1].write_bytes(blob)
    return folder


BAD = {"train-00000-of-00002:2", "train-00001-of-00002:0", "train-00001-of-00002:3"}


def config(folder, **fields):
    return DataConfig(**{"path": str(folder), "frames": 5, "batch": 4, "seed": 7, **fields})


def take(folder, steps, rows=range(4), start=0, **fields):
    stream = BatchStream(Dataset(config(folder, **fields)), rows, start)
    batches = [next(stream) for _ in range(steps)]
    stream.close()
    return batches


def ids(batches):
    return [b["record_ids"].tolist() for b in batches]


def records(batches):
    return [name.rsplit(":", 1)[0] for names in ids(batches) for name in names]


def assert_equal(one, other):
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype.kind == b[name].dtype.kind
            np.testing.assert_array_equal(a[name], b[name])


def test_crops_are_what_their_ids_say(folder):
    (batch,) = take(folder, 1)
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


@pytest.mark.parametrize("batch", [4, 5])
def test_every_epoch_has_every_record_once_and_differs(folder, batch):
    """Also where a step ends one epoch and begins the next."""
    made = take(folder, -(-3 * CLIPS // batch), range(batch), batch=batch)
    order = records(made)
    epochs = [order[k * CLIPS : (k + 1) * CLIPS] for k in range(3)]
    assert all(len(set(epoch)) == CLIPS for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    starts = {int(name.rsplit(":", 1)[1]) for names in ids(made) for name in names}
    assert starts == set(range(FRAMES - 5 + 1)), "crops begin everywhere"
    crop_of = [dict(n.rsplit(":", 1) for n in sum(ids(take(folder, 3, start=3 * k)), [])) for k in range(3)]
    assert crop_of[0] != crop_of[1] != crop_of[2], "another epoch is other crops"


def test_neighbouring_seeds_share_no_epoch(folder):
    orders = [tuple(records(take(folder, 3, start=3 * e, seed=s))) for s in range(3) for e in range(3)]
    assert len(set(orders)) == 9


@pytest.mark.parametrize("where", ["folder", "damaged"])
@pytest.mark.parametrize("start", [0, 5])
def test_every_way_to_a_step_gives_the_same_batch(where, start, request):
    """One process or two, from the beginning or the middle, with any threads, with damage or without."""
    folder = request.getfixturevalue(where)
    whole = take(folder, 11)[start:]
    steps = len(whole)
    assert_equal(take(folder, steps, start=start, threads=3, prefetch=1), whole)
    assert_equal(take(folder, steps, start=start, threads=0), whole)
    halves = [take(folder, steps, rows, start) for rows in (range(2), range(2, 4))]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*halves, strict=True)]
    assert_equal(joined, whole)
    dataset = Dataset(config(folder))
    backwards = [dataset.rows(start + s, range(4)) for s in reversed(range(steps))]
    assert_equal(backwards[::-1], whole)
    np.testing.assert_array_equal(dataset.row(start, 3)["frames"], whole[0]["frames"][3])
    assert_equal(take(folder, steps, [3, 0], start), [{k: b[k][[3, 0]] for k in b} for b in whole])


def test_bad_records_are_replaced_counted_and_named(damaged, folder, caplog):
    with caplog.at_level(logging.WARNING):
        made = take(damaged, 9, max_bad_records=3)
    assert not BAD & set(records(made)) and len(set(records(made))) == CLIPS - 3
    good = records(take(folder, 9))
    same = [a == b for a, b in zip(records(made), good, strict=True)]
    assert same == [name not in BAD for name in good], "only the bad ones are replaced"
    warnings = [r.getMessage() for r in caplog.records]
    assert len(warnings) == 3 and {w.split()[1].removesuffix(":") for w in warnings} == BAD
    with pytest.raises(DataError, match=r"^train-\S*: .* 3 bad records, config.data.max_bad_records = 2$"):
        take(damaged, 9, max_bad_records=2)


def test_a_stream_of_bad_records_ends_whatever_the_budget(folder):
    with pytest.raises(DataError, match=r"has 9 frames: cannot give 13 .*12 bad records"):
        take(folder, 1, frames=13, max_bad_records=100)
    with pytest.raises(DataError, match=r"cannot give 13 .* 1 bad records, config.data.max_bad_records = 0"):
        take(folder, 1, frames=13, max_bad_records=0)


def test_transform_gets_crops(folder):
    stream = BatchStream(
        Dataset(config(folder)), range(4), 0, lambda crop: crop | {"frames": crop["frames"] // 2}
    )
    batch = next(stream)
    stream.close()
    np.testing.assert_array_equal(batch["frames"], take(folder, 1)[0]["frames"] // 2)


def test_crops_are_every_clip_once_in_order(folder, damaged):
    batches = list(crops(config(folder)))
    assert [len(b["record_ids"]) for b in batches] == [4, 1]
    assert sum(ids(batches), []) == [f"held_out-00000-of-00001:{i}:0" for i in range(5)]
    assert sum(len(b["record_ids"]) for b in crops(config(folder), clips=3)) == 3
    assert len(list(crops(config(folder, batch=100)))) == 1, "no batch must be full"
    assert [len(b["record_ids"]) for b in crops(config(damaged), "train")] == [4, 4, 1]


def test_clips_of_different_sizes_are_one_line(tmp_path):
    clips = [make_clip(n, size=(6, 8 + 2 * (n == 1))) for n in range(4)]
    write_shard(tmp_path / shard_name("train", 0, 1), map(encode, clips), "uncompressed")
    with pytest.raises(DataError, match=r"clips of different sizes: train-\S* has \(6, \d+\), train-\S* has"):
        take(tmp_path, 1)


def test_bad_settings_and_folders(folder, tmp_path, broken_bucket):
    with pytest.raises(ConfigError, match="^frames = 0"):
        config(folder, frames=0)
    with pytest.raises(DataError, match="^config.data.path = '.*': no shard train-"):
        Dataset(config(tmp_path))
    with pytest.raises(
        DataError, match=r"^config.data.path = .*: 12 readable clips for config.data.batch = 16; collect more"
    ):
        Dataset(config(folder, batch=16))
    with pytest.raises(ConfigError, match="^config.data.path = 'gs://broken/data': no such bucket: broken$"):
        Dataset(config(f"{broken_bucket}/data"))


def test_data_in_an_object_store(folder, emulated_bucket, damaged):
    """The same batches as from the disk, read by ArrayRecord's own client; damage and a wrong bucket are lines."""
    for source in (folder, damaged):
        for path in source.glob("*.array_record"):
            write_whole(f"{emulated_bucket}/{source.name}/{path.name}", path.read_bytes())
        assert_equal(take(f"{emulated_bucket}/{source.name}", 4), take(source, 4))
    write_whole(f"{emulated_bucket}/{folder.name}/train-00001-of-00002.array_record", b"hello")
    with pytest.raises(DataError, match=f": {CLIPS // 2} readable clips for"):
        Dataset(config(f"{emulated_bucket}/{folder.name}", batch=CLIPS))
    with pytest.raises(DataError, match=r"^config.data.path = 'gs://bucket/nothing': no shard train-"):
        Dataset(config(f"{emulated_bucket}/nothing"))
    with pytest.raises(ConfigError, match=r"^config.data.path = 'gs://nowhere/data': ") as caught:
        Dataset(config("gs://nowhere/data"))
    assert "\n" not in str(caught.value)
