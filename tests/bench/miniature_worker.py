"""The parts of `miniature` that need JAX and the package.

python -m tests.bench.miniature_worker FOLDER DEVICES --train=RUN [--sample] [--distributed ...]

trains or resumes a run, then prints the state of run `whole` as it is restored here, and how far samples are from
those of one device.
"""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lingbot_jax.config import build, template
from lingbot_jax.control.keyboard import integrate
from lingbot_jax.convert import contents, write
from lingbot_jax.data import records, schema
from lingbot_jax.data.loader import Dataset
from lingbot_jax.diffusion.guidance import Guidance
from lingbot_jax.parallel import multihost
from lingbot_jax.parallel.mesh import MeshConfig, make_mesh
from lingbot_jax.rollout.sample import sample_clips
from lingbot_jax.rollout.session import Session
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.training.run_dir import load_config
from lingbot_jax.training.start import objective_of
from lingbot_jax.training.state import abstract_state
from lingbot_jax.worlds import checksums, storage
from lingbot_jax.worlds.checkpoints import Checkpoints
from lingbot_jax.worlds.clips import prepare
from lingbot_jax.worlds.config import CausalConfig, SampleConfig, WorldConfig, pixels_per_token
from lingbot_jax.worlds.open import find, open_world, params_folder
from lingbot_jax.worlds.world import World, modules
from tests.bench import miniature

TOKENS = (2, 4)  # rows and columns of a latent frame


def size_of(config: WorldConfig) -> tuple[int, int]:
    """Height and width of the clips, in pixels."""
    rows, columns = pixels_per_token(config.network)
    return rows * TOKENS[0], columns * TOKENS[1]


def make_data(bundle: pathlib.Path, folder: pathlib.Path, clips: int, frames: int) -> None:
    """Colour gradients that move with the keys, in two shards."""
    height, width = size_of(find(bundle).config)
    folder.mkdir()
    for split, count in (("train", clips), ("held_out", 4)):
        made = [schema.encode(_clip(i, split, frames, height, width)) for i in range(count)]
        for s in range(2):
            records.write_shard(folder / records.shard_name(split, s, 2), made[s::2], "uncompressed")


def _clip(i: int, split: str, frames: int, height: int, width: int) -> schema.Clip:
    rng = np.random.default_rng([i, split == "train"])
    keys = np.zeros((frames, 8), np.uint8)
    keys[1:, rng.integers(4)] = 1
    ramp = (np.linspace(0, 200, width)[None, :, None] + rng.integers(0, 50, 3)) * np.ones((height, 1, 1))
    return schema.Clip(
        frames=np.stack([np.roll(ramp, f, axis=1) for f in range(frames)]).astype(np.uint8),
        keys=keys,
        c2w=integrate(keys),
        intrinsics=np.tile(np.float32([width / 2, width / 2, width / 2, height / 2]), (frames, 1)),
        timestamps=np.arange(frames) / 16.0,
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


def in_float32(config: WorldConfig) -> WorldConfig:
    """The same world, computed in float32."""
    networks = {name: dataclasses.replace(n, dtype="float32") for name, n in config.networks.items()}
    codec = dataclasses.replace(config.codec, dtype="float32")
    return dataclasses.replace(
        config, networks=networks, codec=codec, text=dataclasses.replace(config.text, dtype="float32")
    )


def train_config(
    folder: pathlib.Path, name: str, mesh: MeshConfig, steps: int, saved: int, frames: int
) -> ConfigDict:
    world = in_float32(find(folder / "bundle").config)
    bundle = str(folder / "bundle")
    return template(
        TrainConfig,
        {
            "run": str(folder / name),
            "stage": "world",
            "steps": steps,
            "init": bundle,
            "codec": bundle,
            "world": dataclasses.asdict(world),
            "data": {"path": str(folder / "data"), "frames": frames, "batch": 2 * mesh.data * mesh.fsdp},
            "tasks": {"max_conditioning_frames": 2},
            "optimizer": {"learning_rate": 1e-4, "warmup": 0},
            "checkpoint": {"every": saved},
            "mesh": dataclasses.asdict(mesh),
            "log_every": 1,
        },
    )


def converted_back(bundle: pathlib.Path, folder: pathlib.Path) -> bool:
    """Whether bundle -> published -> bundle gives every array its bits again."""
    write.to_published(contents.look(str(bundle)), folder / "published")
    write.to_bundle(contents.look(str(folder / "published")), folder / "again", dtype="keep")
    return equal_bundles(bundle, folder / "again")


def equal_bundles(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether every array of two bundles has the same bits."""
    names = modules(find(one).config)
    if names.keys() != modules(find(other).config).keys():
        return False
    for name in names:
        a, b = (storage.Reader(params_folder(bundle, name)) for bundle in (one, other))
        if {p: (s.shape, s.dtype) for p, s in a.specs.items()} != {
            p: (s.shape, s.dtype) for p, s in b.specs.items()
        }:
            return False
        for path in a.specs:
            if a.read(path, None).tobytes() != b.read(path, None).tobytes():
                return False
    return True


def state(folder: pathlib.Path, devices: int) -> dict[str, Any]:
    """Digests of the newest state of run `whole`, as it is restored here, and its next records."""
    config = load_config(folder / "whole")
    mesh = make_mesh(miniature.mesh_of(devices))
    objective = objective_of(config)
    counts = {name: objective.update_count(name) for name in config.world.networks}
    wanted = vars(abstract_state(config, mesh, objective.trains, counts))
    restored = Checkpoints(config.run, read_only=True).restore(wanted)
    digests = checksums.digests_of(storage.named(restored))
    rows = multihost.rows_of_process(mesh, config.data.batch)
    data = Dataset(config.data)
    ids = [[r, str(data.row(config.steps, r)["record_ids"])] for r in rows]
    return {"state": {"step": int(restored["step"])} | digests, "records": ids}


def sample(folder: pathlib.Path, devices: int) -> dict[str, float]:
    """How far frames sampled and played on a mesh of all devices are from those on one, in float32."""
    mesh, single = _frames(folder, devices), _frames(folder, 1)
    return {name: float(np.abs(mesh[name] - single[name]).max()) for name in mesh}


def _frames(folder: pathlib.Path, devices: int) -> dict[str, np.ndarray]:
    """Frames in [-1, 1], sampled and played from the bundle on the first devices."""
    mesh = make_mesh(miniature.mesh_of(devices), jax.devices()[:devices])
    world = _opened(folder / "bundle", mesh)
    config = world.config
    data = Dataset(dataclasses.replace(load_config(folder / "whole").data, batch=4), "held_out")
    rows = data.rows(0, range(4))
    clips = prepare(config, world.text, rows, np.ones(4, np.int32))
    settings = SampleConfig(steps=3, shift=5.0, guidance=Guidance(low=2.0, high=2.0))
    sampled = sample_clips(world, clips, settings, seed=1)
    # A session is one sample, so its devices share the tokens; one network generates chunks.
    line = _opened(folder / "bundle", make_mesh(MeshConfig(fsdp=1, seq=-1), jax.devices()[: min(devices, 2)]))
    name = next(iter(config.networks))
    alone = dataclasses.replace(line.config, networks={"world": config.networks[name]})
    line = World({"world": line.networks[name]}, line.codec, line.text, alone, line.mesh)
    session = Session(line, causal=CausalConfig(chunk=1, window=4, sink=1))
    session.start(rows["frames"][0, 0], "a hall", seed=1)
    walk = np.eye(8, dtype=bool)[0]
    played = np.concatenate([session.step(walk) for _ in range(6)])
    return {"sampled": sampled, "played": played.astype(np.float32) / 127.5 - 1}


def _opened(bundle: pathlib.Path, mesh) -> World:
    world = open_world(bundle, mesh, dtype="float32")
    config = in_float32(world.config)
    networks = {name: _with_config(n, config.networks[name]) for name, n in world.networks.items()}
    return dataclasses.replace(world, networks=networks, config=config)


def _with_config(network, config):
    """The same parameters under a config of the same sizes."""
    from lingbot_jax.models import params
    from lingbot_jax.worlds.world import template as abstract

    return params.with_arrays(abstract(config), params.arrays_of(network))


if __name__ == "__main__":
    from experiments import train as experiment  # the config files of its own command import this module

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("total", type=int)
    parser.add_argument("--train", required=True)
    parser.add_argument("--sample", action="store_true")
    parser.add_argument("--distributed", action="store_true")
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    given = parser.parse_args()
    if given.distributed:
        multihost.initialize(given.coordinator, given.processes, given.process)
    made = miniature.train_config(given.folder, given.train, given.total)
    experiment.run(build(TrainConfig, made.to_dict()))
    found = state(given.folder, given.total)
    print(json.dumps(found | (sample(given.folder, given.total) if given.sample else {})))
