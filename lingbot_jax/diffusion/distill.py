"""Distribution matching distillation and its adversarial term: the equations, as pure functions (paper section 3.4.2).

A student's clean samples x are noised to a level that the scores are compared at; two networks say what the clean
latent there would be, mu_real (the frozen teacher, guided) and mu_fake (a critic that follows the student):

    Eq. 3, 4   student         x moves along mu_real - mu_fake     `dmd_gradient`, `surrogate_loss`; both: `dmd_loss`
               critic          flow matching on the student's x    `critic_loss`
    Eq. 5      student         f(-D(x))                            `adversarial_loss`
    Eq. 6      discriminator   f(-D(real)) + f(D(x))               `discriminator_loss`

f is the softplus. Eqs. 5 and 6 are printed with f(1 - D) for the student and f(D(real)) - f(1 - D(x)) for the
discriminator. Minimised, the printed Eq. 6 lowers D on real and on generated videos alike, so it does not separate
them; we use the logistic losses that it abbreviates.

Scores follow from the predictions, score = ((1 - s) mu - x_s) / s^2, so that Eq. 3 at the level s is (1 - s)^2 / s^2
times the gradient that is used here; the division by mean |x - mu_real| takes the place of that factor.

Guidance is uncond + g (cond - uncond), as everywhere here. Self-Forcing and what follows it write
cond + g' (cond - uncond): their g' = 3 is our g = 4, and their "no guidance", g' = 0, is our g = 1.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray
from pydantic import Field

from lingbot_jax.config import Inside, Positive, config, require
from lingbot_jax.diffusion.flow import (
    TIMESTEPS,
    add_noise,
    over,
    shift_sigma,
    unshift_sigma,
    velocity_target,
    x0_from_velocity,
)
from lingbot_jax.diffusion.guidance import Scale, guide

C = TypeVar("C")
F = TypeVar("F")
Latents = Float[Array, "b t h w c"]
Level = Float[Array, "b #t"]  # noise levels (sigma) of latent frames, in [0, 1]
Mask = Float[Array, "b t"]  # 1 where a latent frame counts
Network = Callable[[Latents, Float[Array, "b t"], C], Latents]  # (noisy, timestep, condition) -> velocity
Predict = Callable[[Latents, Level], Latents]  # (noisy, level) -> clean latent


@config
class ScoreConfig:
    """At which noise levels, and with what guidance, the teacher's and the student's scores are compared."""

    shift: Annotated[Positive, Field(le=1000)] = Field(
        5.0, description="of the noise levels, which are uniform before it"
    )
    lowest: Inside = Field(0.02, description="noise level that lower ones are raised to")
    highest: Inside = Field(0.98, description="noise level that higher ones are lowered to")
    guidance: Scale = Field(
        4.0, description="scale of the real score (3 in Self-Forcing's convention); 1: none, one pass"
    )

    def __post_init__(self):
        ok = self.lowest < self.highest
        require(ok, "lowest", self.lowest, f"must be below highest = {self.highest}")


def score_level(u: Float[Array, "..."], config: ScoreConfig) -> Float[Array, "..."]:
    """The noise level of u in [0, 1]: shifted, then clamped to [lowest, highest]."""
    return jnp.clip(shift_sigma(u, config.shift), config.lowest, config.highest)


def sample_score_level(
    key: PRNGKeyArray, batch: int, config: ScoreConfig, region: tuple[float, float] = (0.0, 1.0)
) -> Float[Array, "b 1"]:
    """Draws a noise level per sample, shared by its frames, under the condition that it lies in `region`.

    A step compares scores in the region of one expert, drawn with its share (`share_above`), so that the levels
    together are distributed as without experts and no batch is split between two networks.

    Raises:
      ConfigError: no level of the config lies in the region.
    """
    lo, hi = region
    some = max(lo, config.lowest) < min(hi, config.highest)
    require(some, "highest", (config.lowest, config.highest), f"no score level lies in the expert's {region}")
    u_lo, u_hi = unshift_sigma(lo, config.shift), unshift_sigma(hi, config.shift)
    u = u_lo + (u_hi - u_lo) * jax.random.uniform(key, (batch, 1))
    # Routing compares with the boundary: rounding may not leave the region.
    return jnp.clip(score_level(u, config), max(lo, config.lowest), min(hi, config.highest))


def share_above(config: ScoreConfig, boundary: float) -> float:
    """The part of the score levels at or above `boundary`, a (shifted) noise level: the high-noise expert's."""
    if boundary <= config.lowest:
        return 1.0
    return 1.0 - float(unshift_sigma(boundary, config.shift)) if boundary <= config.highest else 0.0


def generated_frames(known: Int[Array, "b"], frames: int) -> Mask:
    """The mask of the frames that the student made: the first `known` latent frames of a sample are given."""
    return (jnp.arange(frames) >= known[:, None]).astype(jnp.float32)


def predict_x0(
    network: Network, noisy: Latents, sigma: Level, conditions: Sequence[C], scale: float = 1.0
) -> Latents:
    """The clean latent that a network predicts at the level sigma, guided.

    Args:
      conditions: `(cond,)`, `(cond, uncond)` or `(both,)` on a doubled batch: see `guidance.guide`.
      scale: of uncond + scale (cond - uncond). Guiding velocities or clean latents is the same.
    """

    def velocity(x: Latents, condition: C) -> Latents:
        timestep = jnp.broadcast_to(TIMESTEPS * sigma, noisy.shape[:2])
        return network(x, jnp.tile(timestep, (x.shape[0] // noisy.shape[0], 1)), condition)

    return x0_from_velocity(noisy, guide(velocity, tuple(conditions), scale)(noisy), sigma)


def predict_real(
    network: Network, noisy: Latents, sigma: Level, conditions: Sequence[C], config: ScoreConfig
) -> Latents:
    """mu_real: the teacher's guided prediction; of two experts `network` is that of the region that sigma lies in.

    Args:
      conditions: `(cond, uncond)`, or `(both,)` on a doubled batch; without guidance `(cond,)` is enough.
    """
    return jax.lax.stop_gradient(predict_x0(network, noisy, sigma, conditions, config.guidance))


def _mean(values: Float[Array, "b t *rest"], mask: Mask | None) -> Float[Array, ""]:
    """Mean over all elements, or over those of the frames that count."""
    if mask is None:
        return values.mean()
    per_frame = values.reshape(*values.shape[:2], -1).mean(-1)
    return (per_frame * mask).sum() / jnp.maximum(mask.sum(), 1)


def dmd_gradient(
    x: Latents, real: Latents, fake: Latents, mask: Mask | None = None, *, normalise: bool = True
) -> Latents:
    """What x descends along, mu_fake - mu_real, divided by each sample's mean |x - mu_real| (Eq. 3).

    Where the teacher has nothing to say (x = mu_real everywhere) it is zero.

    Args:
      x: the student's clean samples. real, fake: predictions at the same noisy latent.
      mask: frames that the mean is over. normalise: False: without the division.
    """
    gradient = fake - real
    if normalise:
        distance = jnp.abs(x - real)
        weight = jnp.ones(x.shape[:2]) if mask is None else mask
        size = (distance * over(weight, x)).reshape(x.shape[0], -1).sum(-1)
        size = size / jnp.maximum(weight.sum(-1) * distance[0, 0].size, 1)
        gradient = jnp.where(over(size, x) > 0, gradient / over(jnp.where(size > 0, size, 1), x), 0)
    return jax.lax.stop_gradient(gradient)


def surrogate_loss(x: Latents, gradient: Latents, mask: Mask | None = None) -> Float[Array, ""]:
    """Eq. 4: 1/2 mean |x - sg[x - gradient]|^2, whose gradient in x is `gradient` over the number of elements that
    count."""
    return 0.5 * _mean(jnp.square(x - jax.lax.stop_gradient(x - gradient)), mask)


def dmd_loss(
    x: Latents,
    noise: Latents,
    sigma: Level,
    real: Predict,
    fake: Predict,
    mask: Mask | None = None,
    *,
    normalise: bool = True,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The student's loss (Eq. 4) at the noise level sigma, and numbers to log. No gradient enters the scores.

    Args:
      real, fake: `predict_real` of the teacher and `predict_x0` of the critic.
    """
    noisy = jax.lax.stop_gradient(add_noise(x, noise, sigma))
    clean = [jax.lax.stop_gradient(predict(noisy, sigma)) for predict in (real, fake)]
    gradient = dmd_gradient(x, *clean, mask, normalise=normalise)
    return surrogate_loss(x, gradient, mask), {"dmd_gradient": _mean(jnp.abs(gradient), mask)}


def critic_loss(velocity: Latents, x: Latents, noise: Latents, mask: Mask | None = None) -> Float[Array, ""]:
    """The critic's flow matching loss on student samples: mean |v - (noise - x)|^2.

    Args:
      velocity: the critic's, at add_noise(x, noise, sigma), conditional and without guidance.
      x: samples without a gradient: they are the student's, which this loss does not train.
    """
    return _mean(jnp.square(velocity - velocity_target(x, noise)), mask)


def adversarial_loss(fake_logits: Float[Array, "b"]) -> Float[Array, ""]:
    """The student's adversarial loss (Eq. 5, see above): mean f(-D(x)).

    Args:
      fake_logits: of the critic's features of the student's noised samples, with the gradient left in: it reaches the
        samples through the critic, whose parameters, like the head's, another loss trains.
    """
    return jax.nn.softplus(-fake_logits).mean()


def discriminator_loss(
    head: Callable[[F], Float[Array, "b"]], real: F, fake: F
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The discriminator's loss (Eq. 6, see above): mean f(-D(real)) + mean f(D(x)); 2 log 2 is chance.

    Args:
      head: features -> logits (`models.discriminator`). real, fake: the critic's features of recorded and of
        generated videos, noised to the same level. No gradient enters them: the loss reaches the head alone.

    Returns:
      the loss, and the shares of recorded and of generated videos that the head takes for what they are.
    """
    real_logits, fake_logits = (head(jax.lax.stop_gradient(features)) for features in (real, fake))
    loss = jax.nn.softplus(-real_logits).mean() + jax.nn.softplus(fake_logits).mean()
    return loss, {"real_told": (real_logits > 0).mean(), "fake_told": (fake_logits < 0).mean()}
