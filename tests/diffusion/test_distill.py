"""Distillation against what can be solved by hand: a mixture in the plane, whose scores have closed forms.

Latents are `b 1 1 1 2`: one frame of one pixel with two channels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from scipy.stats import qmc

from lingbot_jax.config import ConfigError
from lingbot_jax.diffusion import distill, flow
from lingbot_jax.diffusion.distill import ScoreConfig
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.discriminator import Discriminator, DiscriminatorConfig

CENTRES = np.array([[1.2, 0.0], [-0.8, 1.0], [-0.5, -1.3]])
WEIGHTS = np.array([0.5, 0.3, 0.2])
STD = 0.35


def latents(x):
    return x.reshape(-1, 1, 1, 1, 2)


def log_density(x, sigma, centres, weights, std):
    """log p of x `n 2` at a noise level: a mixture of Gaussians stays one."""
    variance = ((1 - sigma) * std) ** 2 + sigma**2
    distance = jnp.square(x[:, None] - (1 - sigma) * centres).sum(-1)
    return jax.nn.logsumexp(-distance / (2 * variance), b=weights, axis=1) - jnp.log(2 * jnp.pi * variance)


def closed_form(x, timestep, mixture):
    """The velocity of a mixture: what a perfect network predicts. x0 = (x + s^2 score) / (1 - s), v = (x - x0) / s."""
    flat, sigma = x.reshape(-1, 2), timestep[:, 0] / flow.TIMESTEPS
    one = lambda point, s: log_density(point[None], s, *mixture)[0]
    score = jax.vmap(jax.grad(one))(flat, sigma)
    s = sigma[:, None]
    clean = (flat + s**2 * score) / (1 - s)
    return latents((flat - clean) / s)


TARGET = (CENTRES, WEIGHTS, STD)


def sample(key, n):
    which, noise = jax.random.split(key)
    centre = jnp.asarray(CENTRES)[jax.random.choice(which, len(WEIGHTS), (n,), p=jnp.asarray(WEIGHTS))]
    return latents(centre + STD * jax.random.normal(noise, (n, 2)))


def energy_distance(x, y):
    """2 E|x - y| - E|x - x'| - E|y - y'|: zero for equal distributions only."""
    mean = lambda a, b: jnp.linalg.norm(a[:, None] - b[None], axis=-1).mean()
    x, y = x.reshape(-1, 2), y.reshape(-1, 2)
    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


@pytest.mark.parametrize("sigma", [0.3, 0.7])
def test_gradient_is_that_of_the_divergence(sigma):
    """A Gaussian student e^a z + b: the gradient in (a, b) against finite differences of KL(student | target), both at
    the noise level, the latter by integration on a grid in float64."""
    theta = np.array([-0.4, 0.5, -0.3])
    grid = np.stack(np.meshgrid(*[np.linspace(-6, 6, 241)] * 2), -1).reshape(-1, 2)

    def density(centres, weights, std):
        cov = (((1 - sigma) * std) ** 2 + sigma**2) * np.eye(2)
        parts = zip(weights, (1 - sigma) * centres, strict=True)
        return sum(w * stats.multivariate_normal(c, cov).pdf(grid) for w, c in parts)

    def divergence(theta):
        p, q = density(theta[None, 1:], np.ones(1), np.exp(theta[0])), density(*TARGET)
        return np.sum(p * np.log(p / q)) * (12 / 240) ** 2

    step = 1e-4 * np.eye(3)
    expected = [(divergence(theta + e) - divergence(theta - e)) / 2e-4 for e in step]

    draws = qmc.MultivariateNormalQMC(np.zeros(4), rng=np.random.default_rng(0)).random(2**14)
    z, noise = (jnp.asarray(draws[:, part], jnp.float32) for part in (slice(2), slice(2, 4)))
    level = jnp.full((len(z), 1), sigma)

    @jax.jit
    @jax.grad
    def gradient(theta):
        x = latents(jnp.exp(theta[0]) * z + theta[1:])
        own = (theta[None, 1:], jnp.ones(1), jnp.exp(theta[0]))
        real, fake = (lambda x, s, m=m: distill.predict_x0(closed_form, x, s, (m,)) for m in (TARGET, own))
        return distill.dmd_loss(x, latents(noise), level, real, fake, normalise=False)[0]

    # The loss is a mean over two channels; (1 - s)^2 / s^2 leads from predictions to scores.
    ours = np.asarray(gradient(jnp.asarray(theta, jnp.float32))) * 2 * (1 - sigma) ** 2 / sigma**2
    np.testing.assert_allclose(ours, expected, rtol=0.01, atol=0.01 * np.abs(expected).max())


def mlp(key, sizes):
    keys = jax.random.split(key, len(sizes))
    pairs = zip(keys, sizes, sizes[1:], strict=False)
    return [(jax.random.normal(k, (i, o)) * i**-0.5, jnp.zeros(o)) for k, i, o in pairs]


def apply(layers, x):
    for kernel, bias in layers[:-1]:
        x = jax.nn.silu(x @ kernel + bias)
    return x @ layers[-1][0] + layers[-1][1]


def critic(layers, x, timestep, _=None):
    """A velocity network of the plane."""
    sigma = timestep / flow.TIMESTEPS
    waves = [f(np.pi * k * sigma) for k in (1, 2) for f in (jnp.cos, jnp.sin)]
    return latents(apply(layers, jnp.concatenate([x.reshape(-1, 2), *waves], -1)))


def student(layers, z):
    return latents(z + apply(layers, z))


@jax.jit
def distilled(key):
    """A one-step student from N(0, 1), trained by distribution matching alone: energy distances (before, after)."""
    scores = ScoreConfig(shift=1.0, lowest=0.05, highest=0.95, guidance=1.0)
    batch, (own, fake, start) = 200, jax.random.split(key, 3)
    params = (mlp(own, (2, 48, 48, 2)), mlp(fake, (6, 64, 64, 2)))
    schedule = lambda rate: optax.adam(optax.cosine_decay_schedule(rate, 500), 0.0, 0.99)
    optimizers = (schedule(3e-3), optax.adam(3e-3, 0.9, 0.99))
    real = lambda x, s: distill.predict_real(closed_form, x, s, (TARGET,), scores)

    def draws(key):
        z, noise, level = jax.random.split(key, 3)
        return (
            jax.random.normal(z, (batch, 2)),
            jax.random.normal(noise, (batch, 1, 1, 1, 2)),
            distill.sample_score_level(level, batch, scores),
        )

    def critic_loss(fake, own, key):
        z, noise, sigma = draws(key)
        x = student(own, z)
        velocity = critic(fake, flow.add_noise(x, noise, sigma), flow.TIMESTEPS * sigma)
        return distill.critic_loss(velocity, x, noise)

    def student_loss(own, fake, key):
        z, noise, sigma = draws(key)
        predict = lambda x, s: distill.predict_x0(functools.partial(critic, fake), x, s, (None,))
        return distill.dmd_loss(student(own, z), noise, sigma, real, predict)[0]

    def update(optimizer, loss, value, state, *args):
        change, state = optimizer.update(jax.grad(loss)(value, *args), state)
        return optax.apply_updates(value, change), state

    def step(carry, key):
        (own, fake), (own_state, fake_state) = carry
        keys = jax.random.split(key, 4)
        follow = lambda c, k: (update(optimizers[1], critic_loss, *c, own, k), None)
        (fake, fake_state), _ = jax.lax.scan(follow, (fake, fake_state), keys[1:])  # two time scales
        own, own_state = update(optimizers[0], student_loss, own, own_state, fake, keys[0])
        return ((own, fake), (own_state, fake_state)), None

    states = tuple(o.init(p) for o, p in zip(optimizers, params, strict=True))
    trained, _ = jax.lax.scan(step, (params, states), jax.random.split(start, 500))
    z, truth = jax.random.normal(own, (1000, 2)), sample(fake, 1000)
    return [energy_distance(student(p, z), truth) for p in (params[0], trained[0][0])]


def test_a_student_reaches_the_target():
    """Equal distributions are 0.002 apart at this number of samples."""
    before, after = jax.vmap(distilled)(jax.random.split(jax.random.key(0), 3))
    assert (before > 0.05).all() and (after < 0.02).all()


NETWORK = DiTConfig(dim=24, layers=1, heads=1, ffn=1, control="none", dtype="float32")
HEAD = DiscriminatorConfig(depths=(0,), width=16, heads=2)


def features(x):
    """A fixed network of the plane, in the place of the critic: `[depths b t p d]`."""
    rng = np.random.default_rng(0)
    mix, bias = rng.normal(size=(2, NETWORK.dim)), rng.normal(size=NETWORK.dim)
    return jnp.sin(x.reshape(-1, 2) @ mix + bias)[None, :, None, None]


@jax.jit
def adversaries(head, shift, key, moves):
    """400 updates of the real head against a student z -> its samples + shift, which moves (1) or stands still (0).

    Returns (head, shift), and losses and shares told rightly, by step.
    """
    sigma, rates = 0.3, (optax.adam(2e-3, 0.5, 0.99), optax.adam(5e-3, 0.5, 0.99))
    noised = lambda x, k: features(flow.add_noise(x, jax.random.normal(k, x.shape), sigma))

    def head_loss(head, shift, key):
        k = jax.random.split(key, 4)
        real, fake = noised(sample(k[0], 128), k[1]), noised(sample(k[2], 128) + shift, k[3])
        return distill.discriminator_loss(head, real, fake)

    def student_loss(shift, head, key):
        k = jax.random.split(key)
        return distill.adversarial_loss(head(noised(sample(k[0], 128) + shift, k[1])))

    def step(carry, key):
        head, shift, states = carry
        keys = jax.random.split(key)
        (loss, shares), slope = jax.value_and_grad(head_loss, has_aux=True)(head, shift, keys[0])
        change, first = rates[0].update(slope, states[0])
        head = optax.apply_updates(head, change)
        change, second = rates[1].update(jax.grad(student_loss)(shift, head, keys[1]), states[1])
        shift = shift + moves * change
        return (head, shift, (first, second)), (loss, jnp.stack([*shares.values()]))

    states = (rates[0].init(head), rates[1].init(shift))
    (head, shift, _), found = jax.lax.scan(step, (head, shift, states), jax.random.split(key, 400))
    return (head, shift), found


def test_the_head_separates_then_converges_to_chance():
    head = jax.jit(lambda key: Discriminator(HEAD, NETWORK, key))(jax.random.key(1))
    shift = jnp.array([0.7, -0.5])
    (head, _), (loss, told) = adversaries(head, shift, jax.random.key(2), 0.0)
    chance = 2 * np.log(2)
    assert loss[0] == pytest.approx(chance)  # every logit of a new head is zero
    assert loss[-50:].mean() < 0.85 * chance and (told[-50:].mean(0) > 0.65).all()
    (_, moved), (loss, told) = adversaries(head, shift, jax.random.key(3), 1.0)
    assert loss[-50:].mean() == pytest.approx(chance, rel=0.01)
    assert told[-50:].mean() == pytest.approx(0.5, abs=0.03) and jnp.linalg.norm(moved) < 0.1


def test_score_levels_of_regions_together_are_those_without_experts():
    """Uniform, shifted, clamped: the share of each expert and the levels within it against plain draws."""
    config = ScoreConfig(shift=5.0, lowest=0.1, highest=0.97)
    u = (np.arange(4000) + 0.5) / 4000
    plain = np.clip(5 * u / (1 + 4 * u), 0.1, 0.97)
    for boundary, share in ((0.9, np.mean(plain >= 0.9)), (0.05, 1.0), (0.98, 0.0)):
        assert distill.share_above(config, boundary) == pytest.approx(share, abs=1e-3)
    for region in ((0.9, 1.0), (0.0, 0.9)):
        drawn = np.sort(distill.sample_score_level(jax.random.key(0), 4000, config, region)[:, 0])
        own = plain[(plain >= region[0]) & (plain < region[1])]
        expected = np.quantile(own, (np.arange(4000) + 0.5) / 4000)
        assert drawn.min() >= region[0] and drawn.max() <= min(region[1], 0.97)
        np.testing.assert_allclose(drawn, expected, atol=0.03)
    with pytest.raises(ConfigError, match="no score level"):
        distill.sample_score_level(jax.random.key(0), 2, config, (0.98, 1.0))
    with pytest.raises(ConfigError, match=r"lowest = 0.99: must be below highest"):
        ScoreConfig(lowest=0.99)


def test_given_frames_count_nowhere():
    x, real, fake, noise = jax.random.normal(jax.random.key(0), (4, 2, 5, 2, 3, 4))
    mask = distill.generated_frames(jnp.array([1, 3]), 5)
    assert mask.tolist() == [[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    other = lambda a: jnp.where(mask[..., None, None, None] > 0, a, 7 * a + 1)

    @jax.jit
    def losses(x, real, fake):
        gradient = distill.dmd_gradient(x, real, fake, mask)
        return distill.surrogate_loss(x, gradient, mask), distill.critic_loss(fake, x, noise, mask)

    assert losses(x, real, fake) == losses(other(x), other(real), other(fake))
    # The mean is over what counts: six frames.
    counted = np.asarray(mask) > 0
    expected = np.square(np.asarray(fake - (noise - x)))[counted].mean()
    assert losses(x, real, fake)[1] == pytest.approx(expected, rel=1e-5)
    gradient = jax.grad(lambda x: losses(x, real, fake)[0])(x)
    assert (gradient[~counted] == 0).all() and (gradient[counted] != 0).all()


def test_guidance_in_two_passes_or_one():
    noisy, cond, uncond = jax.random.normal(jax.random.key(0), (3, 2, 3, 2, 2, 4))
    sigma = jnp.array([[0.3], [0.8]])
    network = lambda x, timestep, c: timestep[:, :, None, None, None] * x + c
    two = distill.predict_real(network, noisy, sigma, (cond, uncond), ScoreConfig(guidance=4.0))
    one = distill.predict_x0(network, noisy, sigma, (jnp.concatenate([cond, uncond]),), 4.0)
    s = sigma[..., None, None, None]
    np.testing.assert_allclose(two, noisy - s * (1000 * s * noisy + uncond + 4 * (cond - uncond)), rtol=1e-4)
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_no_gradient_enters_the_scores():
    x, noise, weight = jax.random.normal(jax.random.key(0), (3, 2, 3, 2, 2, 4))

    def student(x, weight):
        predict = lambda noisy, sigma: weight * noisy
        return distill.dmd_loss(x, noise, jnp.full((2, 1), 0.5), predict, lambda n, s: 2 * n * weight)[0]

    to_x, to_score = jax.jit(jax.grad(student, (0, 1)))(x, weight)
    assert (to_score == 0).all() and (to_x != 0).any()
