"""A training step of the tiny world from clips and from latents, and clips encoded per second: one JSON line.

Steps from either are timed in turn; their ratio is the median over neighbours. Data is random and in memory.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from experiments.configs.tiny import get_config
from lingbot_jax.config import build
from lingbot_jax.models import params
from lingbot_jax.models.text import HashedNgramEncoder
from lingbot_jax.parallel.mesh import make_mesh
from lingbot_jax.parallel.multihost import place_rows
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.training.objectives import Constants
from lingbot_jax.training.start import fresh_state, objective_of
from lingbot_jax.training.step import batch_specs, encode_program, make_step, networks_of, unpack_program
from lingbot_jax.worlds.clips import Latents
from lingbot_jax.worlds.encode import ClipEncoder
from lingbot_jax.worlds.world import World, template

ROUNDS = 5


def run() -> Iterator[str]:
    values = get_config("world").to_dict() | {"size": (48, 64)}
    config = build(TrainConfig, values)
    mesh, rng = make_mesh(config.mesh), np.random.default_rng(0)
    codec = template(config.world.codec)
    normal = lambda leaf: jax.numpy.asarray(0.1 * rng.normal(size=leaf.shape) + 0.1, leaf.dtype)
    codec = params.with_arrays(codec, {n: normal(leaf) for n, leaf in params.arrays_of(codec).items()})
    text = HashedNgramEncoder(config.world.text)
    constants = Constants(World({}, codec, text, config.world, mesh).encode_text([""]), codec)

    objective = objective_of(config)
    updates = objective.updates(0)
    state = fresh_state(config, mesh, objective)
    step = make_step(objective, config, mesh, updates)
    encode, unpack = encode_program(config, mesh), unpack_program(config, mesh)
    random = lambda s: (rng.integers(0, 2, s.shape) if s.dtype == np.uint8 else rng.random(s.shape)).astype(
        s.dtype
    )
    clips = jax.tree.map(random, batch_specs(config, mesh))
    clips = dataclasses.replace(clips, known=np.ones(config.data.batch, np.int32))
    ahead = encode(codec, text, place_rows(mesh, clips))
    host = jax.tree.map(np.asarray, (ahead.latents, ahead.conditioning.image, ahead.text))
    latents = Latents(*host, clips.camera, clips.known)

    def timed(batch: Callable[[], object]) -> float:
        nonlocal state
        start = time.perf_counter()
        part, metrics = step(state.part(networks_of(updates)), batch(), constants)
        jax.block_until_ready(metrics)
        state = state.updated(part)
        return time.perf_counter() - start

    of_clips = lambda: encode(codec, text, place_rows(mesh, clips))
    of_latents = lambda: unpack(place_rows(mesh, latents))
    timed(of_clips), timed(of_latents)
    pairs = np.array([(timed(of_clips), timed(of_latents)) for _ in range(ROUNDS)])

    encoder = ClipEncoder(codec, text, mesh, config.data.batch, chunk=8)
    alone = lambda: jax.block_until_ready(encoder.latents(np.asarray(clips.frames)))
    alone()
    start = time.perf_counter()
    for _ in range(ROUNDS):
        alone()
    rate = ROUNDS * config.data.batch / (time.perf_counter() - start)
    seconds = np.median(pairs, axis=0)
    numbers = {
        "step_from_clips_s": round(float(seconds[0]), 3),
        "step_from_latents_s": round(float(seconds[1]), 3),
        "clips_over_latents": round(float(np.median(pairs[:, 0] / pairs[:, 1])), 3),
        "clips_encoded_per_second": round(rate, 1),
    }
    yield json.dumps({"bench": "latents", "world": "tiny", "batch": config.data.batch} | numbers)
