"""Play past the published end: `python -m tests.bench endless [--frames=1000]`.

A narrow network with random weights plays, chunk after chunk, as a session does, with a window of 18 latent frames:

    relative     positions in the window, sink 6: play without end
    absolute     positions of the clip, sink 6, as published: the sink moves away, beyond any distance in training
    no sink      the same two without a sink: all distances are those in the window, and positions make no difference

Printed as one JSON line, for ten parts of the play: how far the latents of relative positions are from absolute ones'
(root mean square over that of the values; also of another seed, for scale), and the norms of the keys and values in the
cache; drift is the last part over the second. And the latent frame from which on the Wan VAE's latent of an image and
then grey frames stays the same.
"""

import argparse
import dataclasses
import json
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

from lingbot_jax.models.attention import Attend
from lingbot_jax.models.config import VAEConfig
from lingbot_jax.rollout import device
from lingbot_jax.worlds.condition import Conditioning, conditioning_frames
from lingbot_jax.worlds.config import CausalConfig
from tests.models.test_vae import random_vae
from tests.rollout.worlds import TINY, network

CONFIG = dataclasses.replace(TINY, dim=256, heads=2, layers=4, ffn=512)
SIZE = 4, 4  # latent pixels
SETTLED = 31  # latent frames of conditioning; later ones are as the last
PARTS = 10


def play(causal: CausalConfig, frames: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Latents `t h w c`, and per chunk the norms of its keys and values in the cache, mean over layers and heads."""
    rng, model = np.random.default_rng(0), network(CONFIG)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    mask = jnp.zeros((1, SETTLED, *SIZE, CONFIG.mask_channels)).at[:, 0].set(1.0)
    known = Conditioning(mask, draw(1, SETTLED, *SIZE, CONFIG.latent_channels))
    text = draw(1, CONFIG.text_len, CONFIG.text_dim)
    state = device.DeviceState.start(model, causal, known, jnp.array([[[16.0, 16.0, 16.0, 16.0]]]))
    poses = np.tile(np.eye(4, dtype=np.float32), (frames, 1, 1))
    poses[:, :3, 3] = rng.normal(size=(frames, 3)) * 0.3
    actions = rng.integers(0, 2, (frames, 4)).astype(np.float32)
    found = {"latents": [], "keys": [], "values": []}
    for first in range(0, frames, causal.chunk):
        now = slice(first, first + causal.chunk)
        key = jax.random.key(seed)
        latents, state = device.advance(model, state, text, poses[now], actions[now], key, Attend(), causal)
        slots = state.cache.layout.slot(jnp.arange(now.start, now.stop))
        found["latents"].append(np.asarray(latents[0]))
        for name in ("keys", "values"):
            new = getattr(state.cache, name)[:, :, slots]
            found[name].append(float(jnp.linalg.norm(new, axis=-1).mean()))
    return {"latents": np.concatenate(found["latents"]), "keys": found["keys"], "values": found["values"]}


def parts(x: np.ndarray) -> list[np.ndarray]:
    return np.array_split(np.asarray(x, np.float64), PARTS)


def apart(a: np.ndarray, b: np.ndarray) -> list[float]:
    """Distance of two plays in each part, relative to the second."""
    square = lambda x: float(np.mean(x**2))
    return [round((square(x - y) / square(y)) ** 0.5, 7) for x, y in zip(parts(a), parts(b), strict=True)]


def settles(latent_frames: int = 36) -> int:
    """The first latent frame from which on an image and then grey has one latent, in all layers of the VAE, narrow."""
    image = np.random.default_rng(0).uniform(-1, 1, (1, 1, 8, 8, 3)).astype(np.float32)
    made = jax.jit(lambda vae, x: conditioning_frames(vae, x, jnp.ones(1, jnp.int32), latent_frames))
    latents = np.asarray(made(random_vae(VAEConfig(width=4)), image).image[0])
    still = np.abs(latents - latents[-1:]).max(axis=(1, 2, 3)) == 0
    return int(np.flatnonzero(~still)[-1]) + 1


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench endless", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--frames", type=int, default=1000, help="latent frames, a multiple of 40")
    frames = parser.parse_args(arguments).frames
    relative = CausalConfig(chunk=4, window=18, sink=6, levels=(0, 250, 500, 750), positions="relative")
    absolute = dataclasses.replace(relative, positions="absolute")
    report = {"jax": version("jax"), "latent_frames": frames}
    runs = {"relative": play(relative, frames), "absolute": play(absolute, frames)}
    report["relative_absolute"] = apart(runs["relative"]["latents"], runs["absolute"]["latents"])
    report["seeds"] = apart(play(relative, frames, seed=1)["latents"], runs["relative"]["latents"])
    alone = [play(dataclasses.replace(c, sink=0), frames)["latents"] for c in (relative, absolute)]
    report["relative_absolute_no_sink"] = apart(*alone)
    for name, run in runs.items():
        for what in ("keys", "values"):
            report[f"{name}_{what}"] = [round(float(part.mean()), 4) for part in parts(run[what])]
            report[f"{name}_{what}_drift"] = round(
                report[f"{name}_{what}"][-1] / report[f"{name}_{what}"][1], 5
            )
        report[f"{name}_latents_std"] = [round(float(part.std()), 4) for part in parts(run["latents"])]
    report["grey_settles_at"] = settles()
    print(json.dumps(report))
