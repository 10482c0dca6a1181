"""Stage `world`: flow matching over image-to-video and continuation (paper section 3.3.1, Eq. 1)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lingbot_jax.diffusion.flow import TIMESTEPS, add_noise, sample_sigma, velocity_target
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.dit import Condition, WorldDiT
from lingbot_jax.training.config import FlowConfig, TaskConfig


def draw_given(key: PRNGKeyArray, batch: int, tasks: TaskConfig) -> Int[Array, "b"]:
    """Latent frames given to each sample: 1 (image-to-video), or 2..max_given (continuation)."""
    kind, length = jax.random.split(key)
    several = jax.random.randint(length, (batch,), 2, tasks.max_given + 1)
    return jnp.where(jax.random.bernoulli(kind, tasks.continuation, (batch,)), several, 1)


def drop_conditions(key: PRNGKeyArray, condition: Condition, tasks: TaskConfig) -> Condition:
    """Zeroes text and control of random samples, so that guidance has an unconditional branch."""
    text_key, control_key = jax.random.split(key)
    batch = condition.text.shape[0]
    keep = lambda k, p, x: x * jax.random.bernoulli(k, 1 - p, (batch,) + (1,) * (x.ndim - 1))
    text = keep(text_key, tasks.text_dropout, condition.text)
    control = condition.control
    if control is not None:
        control = keep(control_key, tasks.control_dropout, control)
    return dataclasses.replace(condition, text=text, control=control)


def world_loss(
    model: WorldDiT,
    latents: Float[Array, "b t h w c"],
    condition: Condition,
    key: PRNGKeyArray,
    *,
    flow: FlowConfig,
    tasks: TaskConfig,
    region: tuple[float, float],
    attend: Attend,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """E |v_theta(x_s, s, condition) - (n - x0)|^2 with s shifted and restricted to `region`.

    All frames share a noise level; given frames are noised too and reach the model clean through the
    condition, as in the Wan image-to-video prior.
    """
    sigma_key, noise_key, drop_key = jax.random.split(key, 3)
    batch, frames = latents.shape[:2]
    sigma = sample_sigma(sigma_key, (batch, 1), flow.shift, region)
    noise = jax.random.normal(noise_key, latents.shape, latents.dtype)
    timestep = jnp.broadcast_to(TIMESTEPS * sigma, (batch, frames))
    condition = drop_conditions(drop_key, condition, tasks)
    velocity = model(add_noise(latents, noise, sigma), timestep, condition, attend=attend)
    error = jnp.square(velocity - velocity_target(latents, noise)).mean(axis=(1, 2, 3, 4))
    loss = error.mean()
    # Loss by noise level: a model that ignores its condition shows in the high-noise part.
    noisy = (sigma[:, 0] > 0.8).astype(error.dtype)
    return loss, {"loss": loss, "loss_noisy": (error * noisy).sum() / jnp.maximum(noisy.sum(), 1)}
