"""Stage `world`: flow matching over image-to-video and continuation (paper section 3.3.1, Eq. 1).

Stage `action` is the same loss for the adapters alone (`action.py`). A run with both noise experts trains one of
them at each step: as many of a hundred steps go to the high-noise expert as there are shifted noise levels at or
above the boundary, evenly spread.
"""

import dataclasses
import functools
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lingbot_jax.diffusion.flow import TIMESTEPS, add_noise, sample_sigma, velocity_target
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.dit import Condition, WorldDiT
from lingbot_jax.models.lora import trains
from lingbot_jax.training import curriculum
from lingbot_jax.training.config import TaskConfig, TrainConfig
from lingbot_jax.training.objectives import Constants, Mean, Metrics, Update
from lingbot_jax.worlds.clips import Encoded
from lingbot_jax.worlds.condition import make_condition

NOISY = 0.8  # noise levels above: a model that ignores its condition shows in their loss


@dataclasses.dataclass(frozen=True)
class WorldObjective:
    """Every parameter of every network of the run trains, or its low-rank adapters alone. `config` is the run's, of all
    its phases."""

    config: TrainConfig

    def trains(self, network: str, path: str) -> bool:
        return trains(self.config.lora, path)

    def updates(self, step: int) -> tuple[Update, ...]:
        network = curriculum.network_at(self.config, step)
        phase = self.config.phases()[curriculum.phase_at(self.config, step)]
        return (Update((network,), functools.partial(world_loss, phase, network)),)

    def update_count(self, network: str) -> int:
        return curriculum.update_count(self.config, network)


def draw_known(seed: int, step: int, batch: int, tasks: TaskConfig) -> Int[np.ndarray, "b"]:
    """Latent conditioning frames of each sample: 1 (image-to-video), or 2..max (continuation). On the host: nothing
    on the devices is waited for."""
    rng = np.random.default_rng([seed, step, zlib.crc32(b"conditioning frames")])
    several = rng.integers(2, tasks.max_conditioning_frames, batch, endpoint=True)
    return np.where(rng.random(batch) < tasks.continuation, several, 1).astype(np.int32)


def drop_conditions(
    key: PRNGKeyArray, condition: Condition, null_text: Float[Array, "1 l d"], tasks: TaskConfig
) -> Condition:
    """Random samples lose their text (it becomes the world's null text) or their control (it becomes zero), so
    that guidance has an unconditional branch."""
    text_key, control_key = jax.random.split(key)
    batch = condition.text.shape[0]
    keep = lambda k, p, x: jax.random.bernoulli(k, 1 - p, (batch,) + (1,) * (x.ndim - 1))
    text = jnp.where(keep(text_key, tasks.text_dropout, condition.text), condition.text, null_text)
    control = condition.control
    if control is not None:
        control = control * keep(control_key, tasks.control_dropout, control)
    return dataclasses.replace(condition, text=text, control=control)


def world_loss(
    config: TrainConfig,
    network: str,
    networks: Mapping[str, WorldDiT],
    clips: Encoded,
    constants: Constants,
    key: PRNGKeyArray,
    attend: Attend,
) -> tuple[Float[Array, ""], Metrics]:
    """E |v_theta(x_s, s, condition) - (n - x0)|^2 with s shifted and restricted to the network's region.

    All frames share a noise level; conditioning frames are noised too and reach the network clean through the
    condition, as in the Wan image-to-video prior.
    """
    model, latents = networks[network], clips.latents
    sigma_key, noise_key, drop_key = jax.random.split(key, 3)
    batch, frames = latents.shape[:2]
    sigma = sample_sigma(sigma_key, (batch, 1), config.flow.shift, config.world.region(network))
    noise = jax.random.normal(noise_key, latents.shape, latents.dtype)
    timestep = jnp.broadcast_to(TIMESTEPS * sigma, (batch, frames))
    condition = make_condition(model.config, latents.shape[2:4], clips.text, clips.camera, clips.conditioning)
    condition = drop_conditions(drop_key, condition, constants.null_text, config.tasks)
    velocity = model(add_noise(latents, noise, sigma), timestep, condition, attend=attend)
    error = jnp.square(velocity - velocity_target(latents, noise)).mean(axis=(1, 2, 3, 4))
    noisy = (sigma[:, 0] > NOISY).astype(error.dtype)
    metrics = {
        "loss": Mean(error.sum(), jnp.float32(batch)),
        "loss_noisy": Mean((error * noisy).sum(), noisy.sum()),
    }
    return error.mean(), metrics
