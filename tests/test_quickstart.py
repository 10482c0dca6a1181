"""The demo: what its stages are asked to do."""

import dataclasses
import json

import numpy as np

from experiments.quickstart import stages, walk_arguments
from lingbot_jax.data import records, schema
from lingbot_jax.data.config import DataConfig
from lingbot_jax.training.config import TrainConfig
from tests.data.clips import make_clip
from tests.rollout.worlds import TINY_WORLD


def test_the_walk_starts_at_a_caption_that_is_read_to_its_end(tmp_path):
    dull, colourful = (make_clip(i, size=(16, 32), split="held_out") for i in range(2))
    rng = np.random.default_rng(0)
    colourful = dataclasses.replace(colourful, frames=rng.integers(0, 256, dull.frames.shape, np.uint8))
    long = dataclasses.replace(colourful.captions, static="A gradient that moves to the left. " * 9)
    short = dataclasses.replace(dull.captions, static="A wall.")
    clips = [dataclasses.replace(dull, captions=short), dataclasses.replace(colourful, captions=long)]
    data = tmp_path / "data"
    data.mkdir()
    blobs = [schema.encode(clip) for clip in clips]
    records.write_shard(data / records.shard_name("held_out", 0, 1), blobs, "uncompressed")
    config = TrainConfig(
        run="action",
        stage="action",
        steps=1,
        data=DataConfig(path=str(data), frames=9, batch=1),
        world=TINY_WORLD,
        codec="codec",
    )
    (tmp_path / "action").mkdir()
    (tmp_path / "action" / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    arguments = walk_arguments(tmp_path)
    assert "--prompt=A wall." in arguments and "--clip_frames=9" in arguments
    assert (tmp_path / "first_frame.png").exists()


def test_every_stage_takes_what_the_one_before_it_makes(tmp_path):
    made = set()
    for stage in stages(tmp_path)[:4]:
        command = stage.command([])
        paths = {word.partition("=")[2] for word in command if str(tmp_path) in word}
        assert paths - {str(stage.out)} <= made, stage.name
        made.add(str(stage.out))
