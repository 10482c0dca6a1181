"""Schedules and solvers against closed forms, orders of convergence and a solver written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.diffusion import guidance, schedule, solvers

NAMES = ("euler", "unipc", "dpmpp")


def gaussian_velocity(sigma, x, mean, var):
    """The exact velocity where data are N(mean, var): E[n - x0 | x_s = x] (closed form)."""
    total = (1 - sigma) ** 2 * var + sigma**2
    residual = x - (1 - sigma) * mean
    return sigma * residual / total - (mean + (1 - sigma) * var * residual / total)


def gaussian_standard(x, sigma, mean, var):
    """x in standard deviations at its level: what the exact flow of this data preserves."""
    return (x - (1 - sigma) * mean) / np.sqrt((1 - sigma) ** 2 * var + sigma**2)


def solve(name, steps):
    """Error at sigma = 0.1 after `steps` from 0.9, in float64 NumPy on the float32 table."""
    sigmas = np.linspace(0.9, 0.1, steps + 1)
    table = jax.tree.map(np.float64, getattr(solvers, name)(schedule.Schedule(sigmas, 1000 * sigmas[:-1])))
    noise = np.linspace(-2, 2, 9)
    x, last, m_1, m_2 = noise, *np.zeros((3, 9))
    for i in range(steps):
        m = x - sigmas[i] * gaussian_velocity(sigmas[i], x, 0.4, 0.25)
        x = np.tensordot(table.corrector[i], [x, last, m_1, m_2, m], 1)
        x, last, m_1, m_2 = np.tensordot(table.predictor[i], [x, m, m_1], 1), x, m, m_1
    start = gaussian_standard(noise, 0.9, 0.4, 0.25)
    return np.abs(gaussian_standard(x, 0.1, 0.4, 0.25) - start).max()


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("dpmpp", 2), ("unipc", 2)])
def test_error_falls_with_the_order_of_the_solver(name, order):
    coarse, fine = solve(name, 16), solve(name, 64)
    assert fine < coarse / 4**order * 1.5, (coarse, fine)
    assert fine > 1e-6  # above float32 rounding of the table, or the comparison says nothing


def test_second_order_beats_first_at_the_same_cost():
    assert solve("unipc", 20) < solve("euler", 20) / 10
    assert solve("dpmpp", 20) < solve("euler", 20) / 10


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_shortest_trajectories_end_at_the_last_prediction(name, steps):
    table = solvers.make(name, steps, 5.0)
    assert all(np.isfinite(a).all() for a in table)
    x = jnp.ones((1, 1, 2, 2, 1))
    velocity = lambda latents, t: (latents - 0.3) / jnp.maximum(t / 1000, 1e-3)  # x0 = 0.3 wherever asked
    made = getattr(schedule, name)(steps, 5.0)
    if name == "euler":  # its timesteps are exact, so the prediction is 0.3 at every level
        np.testing.assert_allclose(solvers.run(table, solvers.start(x), velocity).x, 0.3, atol=1e-5)
    assert table.predictor[-1].tolist() == [0.0, 1.0, 0.0]
    assert made.sigmas[-1] == 0.0


def test_integer_timesteps_are_truncated_products():
    assert schedule.dpmpp(10, 1.0).timesteps[6:].tolist() == [399, 299, 199, 99]
    assert schedule.dpmpp(10, 3.0).timesteps[[3, 9]].tolist() == [874, 249]
    assert schedule.dpmpp(70, 10.0).timesteps[50] == 799
    assert schedule.unipc(4, 1.0).sigmas[0] == np.float32(0.999)
    assert schedule.dpmpp(4, 1.0).sigmas[0] == 1.0
    assert schedule.euler(10, 1.0).timesteps[6] == pytest.approx(400, abs=1e-9)


def test_fast_levels_are_looked_up_by_value():
    few = schedule.fast()
    assert few.timesteps.tolist() == [999, 957, 899, 702]
    table = schedule.unipc(1000, 5.0).sigmas
    np.testing.assert_array_equal(few.sigmas, table[[0, 179, 357, 679]])
    np.testing.assert_array_equal(few.renoise, table[[1, 180, 358, 679]])
    with pytest.raises(ValueError, match="not in the schedule"):
        schedule.lookup(np.array([3.0, 2.0]), 2.5)


def test_warped_levels_and_training_table():
    np.testing.assert_allclose(schedule.warped().timesteps, [1000, 937.5, 2500 / 3, 625])
    table = schedule.training_table(5.0)
    assert table.nearest(np.array([[1000.0, 0.0]])).tolist() == [[0, 999]]
    assert table.next_sigma(np.array([0.0])) == 0.0
    assert table.weights.mean() == pytest.approx(1.0)


def test_bad_schedules_name_the_field():
    with pytest.raises(ConfigError, match="steps = 0"):
        schedule.unipc(0, 3.0)
    with pytest.raises(ConfigError, match="shift = -1"):
        schedule.dpmpp(4, -1.0)
    with pytest.raises(ConfigError, match="low = 0.5"):
        guidance.Guidance(low=0.5)


def test_guidance_sequential_equals_batched_and_formula():
    rng = np.random.default_rng(0)
    x, a, b = (jnp.asarray(rng.normal(size=(2, 1, 3, 3, 2)), jnp.float32) for _ in range(3))
    predict = lambda latents, condition: jnp.tanh(latents * condition)
    expected = np.tanh(x * b) + 4.0 * (np.tanh(x * a) - np.tanh(x * b))
    np.testing.assert_allclose(guidance.guide(predict, (a, b), 4.0)(x), expected, atol=1e-5)
    doubled = guidance.double(a, b)
    np.testing.assert_allclose(guidance.guide(predict, (doubled,), 4.0)(x), expected, atol=1e-5)
    np.testing.assert_allclose(guidance.guide(predict, (a,), 1.0)(x), np.tanh(x * a), atol=1e-6)


def test_velocity_is_traced_once_for_any_number_of_steps():
    traced = []

    def velocity(x, t):
        traced.append(1)
        return -x * t

    jax.jit(lambda x: solvers.run(solvers.make("unipc", 40, 5.0), solvers.start(x), velocity).x)(
        jnp.ones((1, 1, 2, 2, 1))
    )
    assert len(traced) <= 2  # lax.scan traces its body once, and once more for the carry's type
