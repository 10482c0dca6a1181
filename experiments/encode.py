"""Encodes the clips of a data set ahead of training: crops of latents, with their conditioning latents and texts.

python -m experiments.encode --config=experiments/configs/tiny.py:encode

Training takes the folder as it takes one of clips, with --config.data.path. The same command again makes the shards
that are missing. Several processes, each with devices of its own, share the shards: --part=0/8 to --part=7/8; the last
one to end finishes the folder, whichever it is.
"""

import dataclasses
import os
import re

import jax
from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import common
from experiments.configs.schema import EncodeConfig
from lingbot_jax.config import require
from lingbot_jax.data.encode import Summary, encode_clips, first_size
from lingbot_jax.data.latents import read_manifest
from lingbot_jax.data.records import ErrorBudget
from lingbot_jax.parallel.mesh import make_mesh
from lingbot_jax.parallel.multihost import rows_of_process
from lingbot_jax.training.latents import manifest_of
from lingbot_jax.worlds import storage
from lingbot_jax.worlds.encode import ClipEncoder
from lingbot_jax.worlds.open import find, open_encoders

CONFIG = common.define_config(EncodeConfig)
PART = flags.DEFINE_string("part", "0/1", "which of how many processes that share the shards this is")


def main() -> None:
    config = common.load(CONFIG, EncodeConfig)
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", PART.value)
    if not found or int(found[1]) >= int(found[2]):
        raise common.UserError(f"--part={PART.value}: must be I/N with I in 0..N-1, as 0/8")
    print(run(config, (int(found[1]), int(found[2]))))


def run(config: EncodeConfig, part: tuple[int, int] = (0, 1)) -> Summary:
    """What `python -m experiments.encode` does, in this process. Raises ConfigError."""
    source, clips = find(config.codec, "config.codec"), config.data.path
    require(read_manifest(clips) is None, "config.data.path", clips, "holds latents; give clips")
    text = config.text or source.config.text
    for name, value in (("codec", source.config.codec), ("text", text)):
        require(
            value is not None, f"config.{name}", getattr(config, name), f"there is no {name} in it; give one"
        )
    mesh = make_mesh(config.mesh, jax.local_devices())
    rows_of_process(mesh, config.data.batch)
    budget = ErrorBudget(config.data.max_bad_records)
    described = dataclasses.replace(source.config, text=text)
    codec, encoder = open_encoders(dataclasses.replace(source, config=described), mesh)
    manifest = manifest_of(
        codec,
        encoder,
        clips=os.fspath(storage.located(clips)),
        frames=config.data.frames,
        grid=config.grid or config.data.frames,
        size=config.size or first_size(clips, budget),
        conditioning=config.conditioning,
        captions=config.captions,
        dtype=config.dtype,
        temporal=config.temporal,
    )
    made = ClipEncoder(codec, encoder, mesh, config.data.batch, config.chunk)
    columns = (TextColumn("encode"), BarColumn(), MofNCompleteColumn(), TextColumn("clips"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("clips", total=None)
        start, advance = (lambda clips: progress.update(bar, total=clips)), (lambda: progress.advance(bar))
        return encode_clips(config.out, manifest, made, budget, config.text_bytes, part, start, advance)


if __name__ == "__main__":
    common.run(main)
