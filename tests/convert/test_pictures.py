"""Pictures of a bundle: from a run's held-out clips, from a folder, and kept by the next conversion."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from lingbot_jax.config import ConfigError
from lingbot_jax.convert import contents, pictures, write
from lingbot_jax.data import records, schema
from lingbot_jax.rollout.images import cover
from lingbot_jax.worlds import manifest
from lingbot_jax.worlds.open import find
from tests.data.clips import make_clip
from tests.rollout.worlds import TINY_WORLD, world, write_bundle
from tests.training.micro import config as train_config


@pytest.fixture
def found(tmp_path):
    return contents.look(str(write_bundle(tmp_path / "bundle", world())))


def test_a_folder_of_pictures_travels_with_the_bundle(found, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a_hall.png", (20, 40)), ("b.jpg", (64, 64))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)
    (folder / "b.txt").write_text("a yard at night\n")
    starts = pictures.choose(str(folder), found)
    assert [(p[0].shape, p[1]) for p in starts.pictures] == [
        ((16, 32, 3), "a hall"),
        ((16, 32, 3), "a yard at night"),
    ]
    write.to_bundle(found, tmp_path / "made", starts=starts)
    again = contents.look(str(tmp_path / "made"))
    write.to_bundle(again, tmp_path / "second", starts=pictures.choose(None, again))
    made = manifest.read(find(tmp_path / "second").path)
    assert [p.prompt for p in made.pictures] == ["a hall", "a yard at night"]
    np.testing.assert_array_equal(
        manifest.image(find(tmp_path / "second").path, made.pictures[0]), starts.pictures[0][0]
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0", "pictures = 0: must be 1 to 100"),
        ("3", "pictures = 3: clips are taken from a run's data, this is a bundle"),
        ("nowhere", "pictures = 'nowhere': neither a number nor a folder"),
    ],
)
def test_mistakes_are_one_line(found, value, message):
    with pytest.raises(ConfigError, match=message):
        pictures.choose(value, found)


def test_clips_of_a_run_one_of_each_place_first(found, tmp_path):
    """Colourful before dull; a place (map and caption) again only when every place was taken."""
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    shown = []
    for number, (place, contrast) in enumerate([("a", 250), ("a", 200), ("b", 100), ("c", 50)]):
        clip = make_clip(number, size=(32, 64), split="held_out")
        frames = rng.integers(0, contrast, clip.frames.shape).astype(np.uint8)
        shown.append(dataclasses.replace(clip, frames=frames, map=place))
    records.write_shard(
        data / records.shard_name("held_out", 0, 1), map(schema.encode, shown), "uncompressed"
    )
    run = train_config(tmp_path, "run", size=(16, 32))
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(run)))
    source = dataclasses.replace(found, kind="run", path=str(tmp_path), config=TINY_WORLD)
    starts = pictures.choose("3", source)
    expected = [cover(shown[i].frames[0], (16, 32))[0] for i in (0, 2, 3)]
    np.testing.assert_array_equal([p[0] for p in starts.pictures], expected)
    assert starts.fps == 16.0 and starts.pictures[0][2] == pytest.approx((2.0, 2.4, 2.0, 1.5))
