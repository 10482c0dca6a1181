"""A training run small enough for tests: made-up clips, a codec fitted on them, and command line overrides."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np

from lingbot_jax.control.keyboard import integrate
from lingbot_jax.data import records, schema
from lingbot_jax.models.codec import CodecConfig, fit_linear, save_linear

ROOT = pathlib.Path(__file__).parents[2]
FRAMES = 13


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
    """Two train shards and one held-out shard, and `codec.safetensors` beside them."""
    data = folder / "data"
    data.mkdir(parents=True)
    made = [clip(i, "train") for i in range(clips)]
    for s in range(2):
        blobs = [schema.encode(c) for c in made[s::2]]
        records.write_shard(data / records.shard_name("train", s, 2), blobs, "uncompressed")
    held_out = [schema.encode(clip(1000 + i, "held_out")) for i in range(4)]
    records.write_shard(data / records.shard_name("held_out", 0, 1), held_out, "uncompressed")
    video = np.stack([c.frames for c in made]).astype(np.float32) / 127.5 - 1
    save_linear(fit_linear([video], CodecConfig(channels=8)), folder / "codec.safetensors")
    return data


def overrides(folder: pathlib.Path, run: str, **fields: object) -> list[str]:
    """Flags that turn experiments/configs/tiny.py:world into a run of seconds."""
    small = {
        "run": folder / run,
        "codec": folder / "codec.safetensors",
        "data.path": folder / "data",
        "data.frames": FRAMES,
        "data.batch": 4,
        "model.dim": 32,
        "model.layers": 2,
        "model.heads": 2,
        "model.ffn": 48,
        "model.latent_channels": 8,
        "tasks.max_given": 2,
        "log_every": 1,
        "checkpoint.every": 4,
    }
    return [f"--config.{name}={value}" for name, value in (small | fields).items()]


def train(
    folder: pathlib.Path, run: str, stage: str = "world", wait: bool = True, **fields: object
) -> subprocess.Popen | subprocess.CompletedProcess:
    """`python -m experiments.train` in a process of its own."""
    command = [sys.executable, "-m", "experiments.train", f"--config=experiments/configs/tiny.py:{stage}"]
    command += overrides(folder, run, **fields)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    if wait:
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def losses(folder: pathlib.Path, run: str) -> dict[int, float]:
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}
