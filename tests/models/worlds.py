"""A very small transformer and inputs for it, shared by the tests of this folder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lingbot_jax.convert.names import expand
from lingbot_jax.convert.names_dit import dit_table
from lingbot_jax.models import params
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.dit import Condition, WorldDiT
from tests.models import numpy_dit

CONFIG = DiTConfig(
    dim=48,
    layers=2,
    heads=2,
    ffn=80,
    freq_dim=16,
    text_dim=12,
    text_len=5,
    latent_channels=4,
    spatial_stride=2,
    dtype="float32",
)
BATCH, FRAMES, HEIGHT, WIDTH = 2, 6, 4, 6
TOKENS = HEIGHT * WIDTH // 4  # a frame


def random_model(make, seed: int = 0):
    """`make(key)` with every parameter drawn from N(0, 1/fan_in) or N(0, 0.3): no layer is zero."""
    rng = np.random.default_rng(seed)

    def draw(p: jax.ShapeDtypeStruct):
        std = p.shape[-2] ** -0.5 if len(p.shape) > 2 else 0.3
        return jnp.asarray(rng.normal(0, std, p.shape), p.dtype)

    return jax.tree.map(draw, params.abstract(make))


def make(config: DiTConfig = CONFIG, **changes) -> WorldDiT:
    config = dataclasses.replace(config, **changes)
    return random_model(lambda key: WorldDiT(config, key))


def inputs(config: DiTConfig = CONFIG, frames: int = FRAMES, seed: int = 1):
    """Noisy latents, timesteps in [0, 1000] of each frame, condition."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    grid = (BATCH, frames, HEIGHT, WIDTH)
    condition = Condition(
        text=draw(BATCH, config.text_len, config.text_dim),
        control=draw(*grid, config.control_channels) if config.control != "none" else None,
        mask=draw(*grid, config.mask_channels) if config.image_condition else None,
        image=draw(*grid, config.latent_channels) if config.image_condition else None,
    )
    timestep = jnp.asarray(rng.uniform(0, 1000, (BATCH, frames)), jnp.float32)
    return draw(*grid, config.latent_channels), timestep, condition


def frames_of(condition: Condition, part: slice) -> Condition:
    """The condition of some latent frames."""
    cut = lambda x: None if x is None else x[:, part]
    return Condition(condition.text, cut(condition.control), cut(condition.mask), cut(condition.image))


def with_config(model: WorldDiT, config: DiTConfig) -> WorldDiT:
    """The same parameters under another config of the same sizes."""
    structure = jax.tree.structure(params.abstract(lambda key: WorldDiT(config, key)))
    return jax.tree.unflatten(structure, jax.tree.leaves(model))


def published(model: WorldDiT) -> numpy_dit.Arrays:
    """Our parameters under the published names."""
    flat = {name: np.asarray(p[...]) for name, p in params.flat_params(model).items()}
    slots = expand(dit_table(model.config), {name: p.shape for name, p in flat.items()})
    one = lambda p, layer: p if layer is None else p[layer]
    return {n: s.entry.to_published(one(flat[s.entry.ours], s.layer))[s.part] for n, s in slots.items()}


def described(config: DiTConfig) -> dict:
    """What a golden case says of a network with a camera."""
    named = {"num_layers": config.layers, "num_heads": config.heads, "ffn_dim": config.ffn}
    channels = {"in_dim": config.in_channels, "out_dim": config.latent_channels, "control_dim": 6}
    same = {n: getattr(config, n) for n in ("dim", "freq_dim", "text_dim", "text_len", "eps")}
    return named | channels | same | {"model_type": "i2v"}


def sample_of(model: WorldDiT) -> numpy_dit.Sample:
    """The model and the first sample of `inputs`, for the reference."""
    latents, timestep, condition = inputs(model.config)
    first = lambda x: np.moveaxis(np.asarray(x[0]), -1, 0)
    known = np.concatenate([first(condition.mask), first(condition.image)])
    times = np.repeat(np.asarray(timestep[0]), TOKENS)
    text, camera = np.asarray(condition.text[0]), first(condition.control)
    return numpy_dit.Sample(
        described(model.config), published(model), first(latents), times, known, text, camera
    )
