"""A very small transformer and inputs for it, shared by the tests of this folder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lingbot_jax.models import params
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.dit import Condition, WorldDiT

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
