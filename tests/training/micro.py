"""A training run small enough for tests: made-up clips, a codec fitted on them, and ways to run it."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np

from experiments import train as experiment
from lingbot_jax.control.keyboard import integrate
from lingbot_jax.data import records, schema
from lingbot_jax.data.config import DataConfig
from lingbot_jax.models.codec import fit_linear
from lingbot_jax.models.config import DiTConfig, LinearCodecConfig, NgramConfig
from lingbot_jax.parallel.mesh import MeshConfig, make_mesh
from lingbot_jax.training.config import (
    CheckpointConfig,
    FlowConfig,
    OptimizerConfig,
    Phase,
    TaskConfig,
    TrainConfig,
)
from lingbot_jax.worlds.config import CausalConfig, PoseConfig, SampleConfig, WorldConfig
from lingbot_jax.worlds.open import open_world, write_codec
from lingbot_jax.worlds.world import World

ROOT = pathlib.Path(__file__).parents[2]
FRAMES = 13
NETWORK = DiTConfig(
    dim=32,
    layers=2,
    heads=2,
    ffn=48,
    freq_dim=16,
    text_dim=16,
    text_len=8,
    latent_channels=8,
    control="cam_act",
    dtype="float32",
)

# One for all causal stages: their sessions share compiled programs.
CAUSAL = CausalConfig(chunk=1, window=3, sink=1, schedule="warped", levels=(1000, 500), shift=3.0)


def clip(i: int, split: str) -> schema.Clip:
    """A colour gradient that moves with the keys."""
    rng = np.random.default_rng(i)
    keys = np.zeros((FRAMES, 8), np.uint8)
    keys[1:, rng.integers(4)] = 1
    ramp = np.linspace(0, 200, 32)[None, None, :, None] + rng.integers(0, 50, 3)
    frames = np.stack([np.roll(ramp[0], f, axis=1) for f in range(FRAMES)]).repeat(16, 1).astype(np.uint8)
    return schema.Clip(
        frames=frames,
        keys=keys,
        c2w=integrate(keys),
        intrinsics=np.tile(np.float32([16, 16, 16, 8]), (FRAMES, 1)),
        timestamps=np.arange(FRAMES) / 16.0,
        clip_id=f"{split}-{i}",
        source="test",
        split=split,
        map=f"map-{split}",
        seed=i,
        behaviour="free_navigation",
        fps=16.0,
        captions=schema.Captions("A gradient that moves.", f"Gradient number {i}.", ()),
        extra={},
    )


def make_data(folder: pathlib.Path, clips: int = 16) -> pathlib.Path:
    """Two train shards and one held-out shard, and the bundle `codec` beside them."""
    data = folder / "data"
    data.mkdir(parents=True)
    made = [clip(i, "train") for i in range(clips)]
    for s in range(2):
        blobs = [schema.encode(c) for c in made[s::2]]
        records.write_shard(data / records.shard_name("train", s, 2), blobs, "uncompressed")
    held_out = [schema.encode(clip(1000 + i, "held_out")) for i in range(4)]
    records.write_shard(data / records.shard_name("held_out", 0, 1), held_out, "uncompressed")
    video = np.stack([c.frames for c in made]).astype(np.float32) / 127.5 - 1
    write_codec(folder / "codec", fit_linear([video], LinearCodecConfig(channels=8)))
    return data


def world_config(*names: str, network: DiTConfig = NETWORK, **fields: object) -> WorldConfig:
    """The description of the tiny worlds that the tests train."""
    small = {
        "networks": dict.fromkeys(names or ("world",), network),
        "codec": LinearCodecConfig(channels=network.latent_channels),
        "text": NgramConfig(dim=network.text_dim, length=network.text_len),
        "pose": PoseConfig(reference="first", translation="metric"),
        "boundary": 0.7,
        "sample": SampleConfig(steps=2),
    }
    return WorldConfig(**small | fields)


def config(folder: pathlib.Path, run: str, **fields: object) -> TrainConfig:
    """A run in `folder`, of clips of 9 frames for 6 steps and of 13 frames from then on."""
    small = {
        "run": str(folder / run),
        "stage": "world",
        "steps": 12,
        "codec": str(folder / "codec"),
        "world": world_config(),
        "data": DataConfig(path=str(folder / "data"), frames=FRAMES, batch=4),
        "tasks": TaskConfig(max_conditioning_frames=2),
        "optimizer": OptimizerConfig(learning_rate=2e-3, warmup=2),
        "checkpoint": CheckpointConfig(every=4, every_minutes=None),
        "flow": FlowConfig(shift=5.0),
        "curriculum": (Phase(end_step=6, frames=9, batch=8, shift=3.0), Phase(end_step=100000)),
        "log_every": 1,
    }
    return TrainConfig(**small | fields)


def mesh(data: int = 1, fsdp: int = 1, seq: int = 1) -> MeshConfig:
    return MeshConfig(data=data, fsdp=fsdp, seq=seq)


def train(config: TrainConfig) -> None:
    """As the experiment, in this process."""
    experiment.run(config)


def opened(config: TrainConfig) -> World:
    """The world of a run on one device."""
    return open_world(config.run, make_mesh(mesh(), jax.devices()[:1]))


def command(config: TrainConfig) -> list[str]:
    """`python -m experiments.train` of a run, by a config file beside it."""
    path = pathlib.Path(config.run).with_suffix(".config.py")
    path.write_text(
        f"from ml_collections import ConfigDict\ndef get_config():\n"
        f"    return ConfigDict({dataclasses.asdict(config)!r})\n"
    )
    return [sys.executable, "-m", "experiments.train", f"--config={path}"]


def start(config: TrainConfig) -> subprocess.Popen:
    """The command in a process of its own."""
    return subprocess.Popen(
        command(config),
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def losses(folder: pathlib.Path, run: str) -> dict[int, float]:
    """Loss by step; every step is there once."""
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    return {line["step"]: line["loss"] for line in lines}


def losses_of(config: TrainConfig) -> dict[int, float]:
    run = pathlib.Path(config.run)
    return losses(run.parent, run.name)
