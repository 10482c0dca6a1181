"""Golden case i2v_e2e: image, poses and text embeddings to video, through everything."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lingbot_jax.control import plucker, poses
from lingbot_jax.diffusion import guidance, solvers
from lingbot_jax.diffusion.guidance import Guidance
from lingbot_jax.models.dit import Condition, WorldDiT
from lingbot_jax.rollout import images, sample
from lingbot_jax.worlds.condition import conditioning_frames
from lingbot_jax.worlds.config import SampleConfig
from tests.golden import EXACT, Case, Tolerance
from tests.goldens.networks_dit import channels_first, channels_last, load_dit, pad_text
from tests.goldens.networks_vae_text import load_vae

LATENTS = Tolerance(rtol=5e-5)  # README: 50 times the change seen in float64
VIDEO = Tolerance(rtol=2e-4)
VAE_DEFAULTS = {
    "attn_scales": [],
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
}


def load_experts(case: Case) -> dict[str, WorldDiT]:
    return {name: load_dit(case.config, case.weights(f".{name}.")) for name in ("high", "low")}


@jax.jit
def one_step(expert: WorldDiT, row, state, condition, unconditional, scale):
    """Both predictions at a step, and the state after it."""
    timestep = jnp.full(state.x.shape[:2], row.timestep)
    cond, uncond = (expert(state.x, timestep, c) for c in (condition, unconditional))
    return cond, uncond, solvers.step(row, state, guidance.combine(cond, uncond, scale))


@functools.partial(jax.jit, static_argnames=("settings", "boundary"))
def sampled(experts, noise, condition, negative, settings, boundary):
    return sample.denoise(experts, boundary, noise, condition, negative, settings)


def end_to_end(case: Case):
    config, experts = case.config, load_experts(case)
    network = experts["high"].config
    vae_weights = case.weights("vae_")
    vae = load_vae(VAE_DEFAULTS | config["vae"], vae_weights, case["vae_mean"], case["vae_std"])
    image, stride = case["image_u8"], vae.config.stride
    multiple = stride[1] * network.patch[1]
    height, width = images.fit(*image.shape[:2], config["max_area"], multiple)
    frames, t = config["frames"], (config["frames"] - 1) // stride[0] + 1

    pixels = images.resize(image, height, width)
    yield "pixels_first_frame", np.moveaxis(pixels, -1, 0), case["pixels_first_frame"], Tolerance(atol=1e-5)
    known = conditioning_frames(vae, jnp.asarray(pixels)[None, None], jnp.ones(1, int), t)
    yield "y", channels_first(jnp.concatenate([known.mask, known.image], -1)), case["y"], LATENTS
    intrinsics = poses.transform_intrinsics(case["Ks"][:frames], (height, width))
    deltas = poses.relative(poses.resample(poses.validate(case["c2ws"][:frames]), t), "previous", "max_norm")
    packed = plucker.control(deltas, intrinsics[:1], None, "cam", height, width, stride[1])
    yield "cam", np.moveaxis(packed, -1, 0)[None], case["cam"], Tolerance(atol=1e-5)

    texts = (pad_text(case[name], network.text_len) for name in ("context", "context_null"))
    condition, unconditional = (
        Condition(text=text, control=jnp.asarray(packed)[None], mask=known.mask, image=known.image)
        for text in texts
    )
    noise = channels_last(case["noise"])
    for solver in ("unipc", "dpmpp"):
        scales = Guidance(low=config["guide_scale_low"], high=config["guide_scale_high"])
        settings = SampleConfig(steps=config["steps"], shift=config["shift"], solver=solver, guidance=scales)
        rows = solvers.make(solver, settings.steps, settings.shift)
        uses_high = rows.timestep >= config["boundary"] * config["num_train_timesteps"]
        yield f"{solver}/timesteps", rows.timestep, case[f"{solver}/timesteps"], EXACT
        yield f"{solver}/uses_high", uses_high, case[f"{solver}/uses_high"], EXACT
        state, found = solvers.start(noise), {"cond": [], "uncond": [], "latents": [noise]}
        for i, high in enumerate(uses_high):
            scale = jnp.float32(scales.high if high else scales.low)
            row = jax.tree.map(lambda a: jnp.asarray(a[i]), rows)  # noqa: B023 - used at once
            cond, uncond, state = one_step(
                experts["high" if high else "low"], row, state, condition, unconditional, scale
            )
            for name, value in (("cond", cond), ("uncond", uncond), ("latents", state.x)):
                found[name].append(value)
        for name, values in found.items():
            ours = np.stack([channels_first(value) for value in values])
            yield f"{solver}/{name}", ours, case[f"{solver}/{name}"], LATENTS
        # The compiled sampler that everything uses, from the same noise, with both ways of guidance.
        batched = dataclasses.replace(scales, batched=solver == "dpmpp")
        guided = dataclasses.replace(settings, guidance=batched)
        latents = sampled(experts, noise, condition, unconditional.text, guided, config["boundary"])
        video = jax.jit(lambda codec, x: codec.decode(x))(vae, latents)
        yield f"{solver}/video", channels_first(video), case[f"{solver}/video"], VIDEO


CASES = {"i2v_e2e": end_to_end}
