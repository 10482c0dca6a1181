"""The demo: what its stages are asked to do."""

import dataclasses
import json

import numpy as np

from experiments.quickstart import walk_arguments
from lingbot_jax.data import records, schema
from lingbot_jax.training.loop import claim
from tests.training import micro


def test_the_walk_starts_at_a_caption_that_is_read_to_its_end(tmp_path):
    dull, colourful = (micro.clip(i, "held_out") for i in range(2))
    dull = dataclasses.replace(dull, frames=np.full_like(dull.frames, 128))
    long = dataclasses.replace(colourful.captions, static="A gradient that moves to the left. " * 9)
    clips = [dull, dataclasses.replace(colourful, captions=long)]
    data = tmp_path / "data"
    data.mkdir()
    blobs = [schema.encode(clip) for clip in clips]
    records.write_shard(data / records.shard_name("held_out", 0, 1), blobs, "uncompressed")
    (data / "dataset.json").write_text(json.dumps({"config": {"yaw": 3.0}}))
    claim(tmp_path / "action", micro.config(tmp_path, "action"))
    arguments = walk_arguments(tmp_path)
    assert f"--prompt={dull.captions.static}" in arguments and "--turn=3.0" in arguments
