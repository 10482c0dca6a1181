"""Golden case dmd: the gradient of distribution matching, its surrogate loss, score levels and the critic's loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lingbot_jax.diffusion import distill, flow
from tests.golden import Case, Tolerance

CLOSE = Tolerance(rtol=2e-6)
LEVELS = Tolerance(rtol=1e-6)


def dmd(case: Case):
    """Tensors are `b t c h w`; nothing here knows the order of the last three axes."""
    config = case.config
    scores = distill.ScoreConfig(
        shift=config["shift"],
        lowest=config["min_step"] / config["num_train_timestep"],
        highest=config["max_step"] / config["num_train_timestep"],
        guidance=1 + config["guidance"],  # theirs is cond + g (cond - uncond)
    )
    x, noise = jnp.asarray(case["x"]), jnp.asarray(case["noise"])
    mask = jnp.asarray(case["gradient_mask"][:, :, 0, 0, 0], jnp.float32)
    level = distill.score_level(jnp.asarray(case["t_raw"]) / flow.TIMESTEPS, scores)
    yield "t_used", flow.TIMESTEPS * level, case["t_used"], LEVELS
    for name in case.names("t_warp_shift"):
        shifted = distill.ScoreConfig(
            shift=float(name.removeprefix("t_warp_shift")), lowest=scores.lowest, highest=scores.highest
        )
        u = jnp.arange(config["num_train_timestep"]) / config["num_train_timestep"]
        yield name, flow.TIMESTEPS * distill.score_level(u, shifted), case[name], LEVELS
    yield "noisy", flow.add_noise(x, noise, level), case["noisy"], CLOSE

    predict = functools.partial(_predict, case, jnp.asarray(case["noisy"]), level)
    real = predict("real", scores.guidance)
    yield "pred_real", real, case["pred_real"], CLOSE
    for prefix, guidance in (("g0", config["fake_guidance"]), ("g1", config["fake2"])):
        fake = predict("fake", 1 + guidance)
        gradient = distill.dmd_gradient(x, real, fake)
        plain = distill.dmd_gradient(x, real, fake, normalise=False)
        yield f"{prefix}/grad_norm1", gradient, case[f"{prefix}/grad_norm1"], CLOSE
        yield f"{prefix}/grad_norm0", plain, case[f"{prefix}/grad_norm0"], CLOSE
        if prefix == "g0":
            size = (plain / gradient).reshape(len(x), -1)
            yield "normalizer", np.median(size, 1).reshape(-1, 1, 1, 1, 1), case["normalizer"], CLOSE
        for kind, counts in (("nomask", None), ("mask", mask)):
            loss, slope = jax.value_and_grad(distill.surrogate_loss)(x, gradient, counts)
            yield f"{prefix}/loss_{kind}", loss, case[f"{prefix}/loss_{kind}"], CLOSE
            yield f"{prefix}/dloss_dx_{kind}", slope, case[f"{prefix}/dloss_dx_{kind}"], CLOSE
    yield "edge_zero_grad", distill.dmd_gradient(x, x, x), case["edge_zero_grad"], Tolerance()

    predicted = jnp.asarray(case["critic_pred_x0"])
    velocity = (flow.add_noise(x, noise, level) - predicted) / flow.over(level, x)
    yield "critic_flow_pred", velocity, case["critic_flow_pred"], CLOSE
    yield "critic_flow_loss", distill.critic_loss(velocity, x, noise), case["critic_flow_loss"], CLOSE
    yield "critic_x0_loss", jnp.square(predicted - x).mean(), case["critic_x0_loss"], CLOSE


def _predict(case: Case, noisy: jax.Array, level: jax.Array, name: str, scale: float) -> jax.Array:
    """Guided prediction of a stand-in network, whose velocity at `noisy` leads to the stored clean latents."""
    clean = [jnp.asarray(case[f"pred_{name}_{branch}"]) for branch in ("cond", "uncond")]

    def network(x, timestep, condition):
        return (x - condition) / flow.over(timestep / flow.TIMESTEPS, x)

    return distill.predict_x0(network, noisy, level, clean, scale)


CASES = {"dmd": dmd}
