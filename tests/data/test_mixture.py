"""Several data sets in one stream: shares by weight, and still a function of (seed, step)."""

import logging

import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.data.config import DataConfig, MixtureConfig
from lingbot_jax.data.crops import crops, resize_crops
from lingbot_jax.data.loader import BatchStream, Dataset
from lingbot_jax.data.records import DataError, shard_name, write_shard
from lingbot_jax.data.schema import encode
from tests.data.clips import make_clip, make_data

FRAMES = 9


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Twelve clips, six others, and two of another size, in files of the same names."""
    made = [tmp_path_factory.mktemp(name) for name in ("many", "few", "small")]
    make_data(made[0], 12, shards=2, frames=FRAMES)
    make_data(made[1], 6, shards=2, frames=FRAMES)
    write_shard(
        made[2] / shard_name("train", 0, 1), [encode(make_clip(n, size=(4, 6))) for n in (0, 1)], "zstd"
    )
    make_data(made[0], 3, shards=1, frames=FRAMES, split="held_out")
    return made


def config(folders, *weights, **fields):
    first, *rest = (MixtureConfig(path=str(f), weight=w) for f, w in zip(folders, weights, strict=True))
    small = {"path": first.path, "frames": 5, "batch": 4, "seed": 7}
    return DataConfig(**small | {"weight": first.weight, "mixture": tuple(rest)} | fields)


def take(made, steps, rows=range(4), start=0, transform=None):
    stream = BatchStream(Dataset(made), rows, start, transform)
    batches = [next(stream) for _ in range(steps)]
    stream.close()
    return batches


def ids(batches, folder=""):
    """Of the rows from a folder, without its name."""
    names = [name for batch in batches for name in batch["record_ids"].tolist()]
    return [name.removeprefix(f"{folder}/") for name in names if name.startswith(str(folder))]


@pytest.mark.parametrize(
    "weights", [(1.0, 1.0), (0.7, 0.3), (2.0, 6.0, 1.0), (1.0, 150.0), (1.0, 1.006, 3.9)]
)
def test_shares_are_those_of_the_weights(folders, weights):
    """Of 10,000 rows, whichever: no record is read. Every data set hands out its places one after another."""
    mix = Dataset(config(folders[: len(weights)], *weights)).mix
    for first in (0, 123_457):
        drawn = [mix[first + i] for i in range(10_000)]
        for part, weight in enumerate(weights):
            places = [place for number, place in drawn if number == part]
            assert len(places) == pytest.approx(10_000 * weight / sum(weights), rel=0.01, abs=1)
            assert places == list(range(places[0], places[0] + len(places)))
    spread = [sum(mix[i + j][0] == 0 for j in range(100)) for i in range(0, 10_000, 100)]
    assert max(spread) - min(spread) <= 2, "evenly, not in runs"


def test_each_data_set_gives_what_it_gives_alone(folders):
    """The first one the very crops; the others every record once per epoch, in an order and with crops of their own."""
    mixed = take(config(folders[:2], 3.0, 1.0), 24)
    own = ids(mixed, folders[0])
    assert len(own) == 72 and own == ids(take(config(folders[:1], 1.0), 18))
    other = [name.rsplit(":", 1)[0] for name in ids(mixed, folders[1])]
    epochs = [other[k : k + 6] for k in range(0, 24, 6)]
    assert all(len(set(epoch)) == 6 for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    twice = take(config([folders[0], folders[0]], 1.0, 1.0), 6)
    names = [name.rsplit(":", 1)[0] for batch in twice for name in batch["record_ids"].tolist()]
    assert names[::2] != names[1::2], "the same clips, but not in the same order"


def test_every_way_to_a_step_gives_the_same_batch(folders):
    made = config(folders[:2], 2.0, 1.0)
    whole = take(made, 9)[4:]
    halves = [take(made, 5, rows, 4) for rows in (range(2), range(2, 4))]
    for batch, one, other in zip(whole, *halves, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], np.concatenate([one[name], other[name]]))


def test_a_bad_record_is_replaced_from_its_own_data_set(folders, tmp_path, caplog):
    clips = [make_clip(n, 3 if n == 1 else FRAMES) for n in range(3)]
    write_shard(tmp_path / shard_name("train", 0, 1), map(encode, clips), "uncompressed")
    made = config([folders[0], tmp_path], 1.0, 1.0)
    with caplog.at_level(logging.WARNING):
        batches = take(made, 6)
    assert len(ids(batches, folders[0])) == len(ids(batches, tmp_path)) == 12
    assert f"replaced {tmp_path}/train-00000-of-00001:1: " in caplog.text
    # However large the budget: of three clips not all may go, or nothing would be left to replace them with.
    with pytest.raises(DataError, match=r"/train-\S*: .* 3 bad records, config.data.max_bad_records = 2$"):
        take(config([folders[0], tmp_path], 1.0, 1.0, frames=13, max_bad_records=100), 6)


def test_data_sets_of_other_sizes_are_scaled_to_one(folders):
    made = config([folders[0], folders[2]], 1.0, 1.0)
    with pytest.raises(DataError, match="clips of different sizes"):
        take(made, 1)
    (batch,) = take(made, 1, transform=lambda crop: resize_crops(crop, (8, 8)))
    assert batch["frames"].shape == (4, 5, 8, 8, 3)


def test_crops_are_of_the_first_data_set(folders):
    (batch,) = crops(config(folders, 1.0, 1.0, 1.0))
    assert batch["record_ids"].tolist() == [f"held_out-00000-of-00001:{i}:0" for i in range(3)]


def test_mistakes_are_lines(folders, tmp_path):
    with pytest.raises(ConfigError, match="^weight = 2.0: means nothing without a mixture$"):
        config(folders[:1], 2.0)
    with pytest.raises(ConfigError, match=r"^weight = 0.0: must be"):
        config(folders[:2], 1.0, 0.0)
    with pytest.raises(DataError, match=r"^config.data.mixture\[0\].path = '[^\n]*': no shard train-"):
        Dataset(config([folders[0], tmp_path], 1.0, 1.0))
    with pytest.raises(
        DataError, match="^config.data.path = .*: 18 readable clips for config.data.batch = 19"
    ):
        Dataset(config(folders[:2], 1.0, 1.0, batch=19))
