"""Stage `causal`: the bidirectional world becomes one that generates chunk after chunk (paper section 3.4.1, Eq. 2).

Attention is block-causal, within the window and with the sink of play, and every chunk has a noise level of its own:
one of those that play visits (`world.causal.levels`), or t = 0, at which play writes its cache. Eq. 2 is printed for
a network that predicts the clean latent; ours predicts velocity, and

    |x0_theta - x0|^2 = sigma^2 |v_theta - (n - x0)|^2 .

So a chunk at t = 0 has no loss of its own: it teaches as clean context of the noisy chunks after it, through which
a gradient reaches its keys and values, and nothing else of it. `teacher_forcing` has all of the past clean in its
place: the clip stands twice in the sequence, clean and noisy. `ode` has the paper's past, and in place of a noised clip
the teacher's way to a clip of its own, whose end is what every chunk predicts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lingbot_jax.diffusion.flow import add_noise, over, velocity_target
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.dit import Condition, WorldDiT
from lingbot_jax.models.lora import trains
from lingbot_jax.rollout import masks
from lingbot_jax.rollout.trajectory import trajectory
from lingbot_jax.training import curriculum
from lingbot_jax.training.config import STUDENT, TrainConfig
from lingbot_jax.training.networks import scores
from lingbot_jax.training.objectives import Constants, Mean, Metrics, Networks, Update
from lingbot_jax.training.objectives.world import NOISY, drop_conditions
from lingbot_jax.worlds.clips import Encoded
from lingbot_jax.worlds.condition import make_condition
from lingbot_jax.worlds.config import CausalConfig

Latents = Float[Array, "b t h w c"]
Levels = Float[Array, "b t"]


@dataclasses.dataclass(frozen=True)
class CausalObjective:
    """Every parameter of the student trains, or its low-rank adapters. `config` is the run's, of all its phases."""

    config: TrainConfig

    def trains(self, network: str, path: str) -> bool:
        return network == STUDENT and trains(self.config.lora, path)

    def updates(self, step: int) -> tuple[Update, ...]:
        phase = self.config.phases()[curriculum.phase_at(self.config, step)]
        return (Update((STUDENT,), functools.partial(causal_loss, phase), tuple(scores(self.config))),)

    def update_count(self, network: str) -> int:
        return curriculum.update_count(self.config, network)


def draw_levels(
    key: PRNGKeyArray, batch: int, frames: int, config: CausalConfig, clean: float
) -> tuple[Int[Array, "b t"], Levels, Levels]:
    """Step of play, noise level and timestep of every latent frame; the frames of a chunk share theirs.

    Args:
      clean: share of chunks without noise, behind the last step, whose timestep is that of play's cache-update pass.
    """
    few, chunks = config.few_steps(), -(-frames // config.chunk)
    level_key, clean_key = jax.random.split(key)
    drawn = jax.random.randint(level_key, (batch, chunks), 0, len(few.sigmas))
    drawn = jnp.where(jax.random.bernoulli(clean_key, clean, drawn.shape), len(few.sigmas), drawn)
    tables = (jnp.float32([*few.sigmas, 0.0]), jnp.float32([*few.timesteps, config.context_noise]))
    drawn = jnp.repeat(drawn, config.chunk, axis=1)[:, :frames]
    return drawn, tables[0][drawn], tables[1][drawn]


def corrupted(key: PRNGKeyArray, clean: Latents, config: CausalConfig, most: float) -> Latents:
    """Latents with a little noise, of a level of 0 to `most` that the frames of a chunk share."""
    level_key, noise_key = jax.random.split(key)
    batch, frames = clean.shape[:2]
    level = most * jax.random.uniform(level_key, (batch, -(-frames // config.chunk)))
    level = jnp.repeat(level, config.chunk, axis=1)[:, :frames]
    return add_noise(clean, jax.random.normal(noise_key, clean.shape), level)


def block_causal_velocity(
    model: WorldDiT,
    noisy: Latents,
    timestep: Levels,
    condition: Condition,
    config: CausalConfig,
    attend: Attend,
    past: Latents | None = None,
    positions: Int[Array, "t"] | None = None,
) -> Float[Array, "b t h w c"]:
    """Velocity of all chunks in one pass, each seeing what it would see of a cache.

    A clip longer than the window sees its sink where it is; play with relative positions has it nearer.

    Args:
      past: clean latents that noisy chunks see as their past; None: they see each other.
      positions: of the latent frames, for the rotary time axis; None: 0, 1, ...
    """
    frames, p = (
        noisy.shape[1],
        noisy.shape[2] * noisy.shape[3] // (model.config.patch[1] * model.config.patch[2]),
    )
    limits = {"window": config.window, "sink": config.sink}
    if positions is None:
        positions = jnp.arange(frames, dtype=jnp.int32)
    if past is None:
        mask = masks.chunks(frames, config.chunk, p, **limits)
        return model(
            noisy, timestep, condition, attend=dataclasses.replace(attend, mask=mask), positions=positions
        )
    mask = masks.teacher_forcing(frames, config.chunk, p, **limits)
    both = lambda a, b: jnp.concatenate([a, b], axis=1)
    condition = Condition(
        text=condition.text if condition.text.ndim == 3 else both(condition.text, condition.text),
        **{
            n: v if (v := getattr(condition, n)) is None else both(v, v) for n in ("control", "mask", "image")
        },
    )
    velocity = model(
        both(past, noisy),
        both(jnp.full_like(timestep, config.context_noise), timestep),
        condition,
        attend=dataclasses.replace(attend, mask=mask),
        positions=jnp.tile(positions, 2),
    )
    return velocity[:, frames:]


def causal_loss(
    config: TrainConfig,
    networks: Networks,
    clips: Encoded,
    constants: Constants,
    key: PRNGKeyArray,
    attend: Attend,
) -> tuple[Float[Array, ""], Metrics]:
    """Eq. 2 over the chunks of a batch; those at t = 0 count as zero."""
    model, latents, forcing = networks[STUDENT], clips.latents, config.forcing
    level_key, noise_key, drop_key = jax.random.split(key, 3)
    teacher = forcing.method == "teacher_forcing"
    clean = 0.0 if teacher else forcing.clean
    step, sigma, timestep = draw_levels(level_key, *latents.shape[:2], config.world.causal, clean)
    noise = jax.random.normal(noise_key, latents.shape, latents.dtype)
    condition = make_condition(model.config, latents.shape[2:4], clips.text, clips.camera, clips.conditioning)
    condition = drop_conditions(drop_key, condition, constants.null_text, config.tasks)
    noisy, target = add_noise(latents, noise, sigma), velocity_target(latents, noise)
    if forcing.method == "ode":
        states, end = teacher_states(config, networks, noise, condition, constants.null_text, attend)
        states = jnp.append(states, end[None], axis=0)
        noisy = jnp.take_along_axis(states, step[None, :, :, None, None, None], axis=0)[0]
        level = over(sigma, noisy)
        target = jnp.where(level > 0, (noisy - end) / jnp.where(level > 0, level, 1.0), 0.0)
    past = latents
    if forcing.corruption:
        clean = corrupted(jax.random.fold_in(key, 1), latents, config.world.causal, forcing.corruption)
        noisy, past = jnp.where(over(sigma, noisy) > 0, noisy, clean), clean
    past = past if teacher else None
    velocity = block_causal_velocity(model, noisy, timestep, condition, config.world.causal, attend, past)
    return weighted_loss(velocity - target, sigma, forcing.weighting)


def teacher_states(
    config: TrainConfig,
    networks: Networks,
    noise: Latents,
    condition: Condition,
    null_text: Float[Array, "1 l d"],
    attend: Attend,
) -> tuple[Float[Array, "s b t h w c"], Latents]:
    """The teacher's trajectories from `noise` at the levels of play, and their ends."""
    experts = {theirs: networks[name] for name, theirs in scores(config).items()}
    null = jnp.broadcast_to(null_text, condition.text.shape)
    levels, how = config.world.causal.few_steps().sigmas.tolist(), config.forcing.trajectory
    return trajectory(experts, config.world.boundary, noise, condition, null, levels, how, attend)


def weighted_loss(error: Latents, sigma: Levels, weighting: str) -> tuple[Float[Array, ""], Metrics]:
    """Mean squared error of velocities, weighted by sigma^2 (`x0`), or by 1 where there is noise (`velocity`)."""
    scale = {"x0": sigma, "velocity": (sigma > 0).astype(error.dtype)}[weighting]
    # Scaled before it is squared: where the scale is zero, so is the gradient, exactly.
    weighted = jnp.square(over(scale, error) * error).mean(axis=(2, 3, 4))
    plain = jnp.square(jax.lax.stop_gradient(error)).mean(axis=(2, 3, 4))
    noisy = (sigma > NOISY).astype(error.dtype)
    metrics = {
        "loss": Mean(weighted.sum(), jnp.float32(weighted.size)),
        "loss_noisy": Mean((plain * noisy).sum(), noisy.sum()),
    }
    return weighted.mean(), metrics
