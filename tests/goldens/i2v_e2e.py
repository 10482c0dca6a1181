"""Golden case i2v_e2e: image, poses and text embeddings to video, through everything."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from lingbot_jax.models.experts import NoiseExperts
from lingbot_jax.rollout.bidirectional import SampleConfig

from lingbot_jax.control import poses
from lingbot_jax.diffusion import guidance, solvers
from lingbot_jax.diffusion.guidance import Guidance
from lingbot_jax.models.dit import Condition
from lingbot_jax.rollout import bidirectional, images
from tests.golden import EXACT, Case, Tolerance
from tests.goldens import cameras
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


def load_experts(case: Case) -> NoiseExperts:
    high, low = (load_dit(case.config, case.weights(f".{name}.")) for name in ("high", "low"))
    experts = jax.eval_shape(lambda: NoiseExperts(high.config, jax.random.key(0), case.config["boundary"]))
    return experts.replace("high", high).replace("low", low)


@jax.jit
def one_step(experts: NoiseExperts, row, state, condition, unconditional, scale):
    """Both predictions at a step, routed by the experts themselves, and the state after it."""
    timestep = jnp.full(state.x.shape[:2], row.timestep)
    cond, uncond = (experts(state.x, timestep, c) for c in (condition, unconditional))
    return cond, uncond, solvers.step(row, state, guidance.combine(cond, uncond, scale))


def end_to_end(case: Case):
    config, experts = case.config, load_experts(case)
    vae_weights = case.weights("vae_")
    vae = load_vae(VAE_DEFAULTS | config["vae"], vae_weights, case["vae_mean"], case["vae_std"])
    image, stride = case["image_u8"], vae.config.stride
    multiple = stride[1] * experts.config.patch[1]
    height, width = images.fit(*image.shape[:2], config["max_area"], multiple)
    frames, t = config["frames"], (config["frames"] - 1) // stride[0] + 1

    pixels = images.resize(image, height, width)
    yield "pixels_first_frame", np.moveaxis(pixels, -1, 0), case["pixels_first_frame"], Tolerance(atol=1e-5)
    mask, latent = bidirectional.given_frames(vae, jnp.asarray(pixels)[None, None], t)
    yield "y", channels_first(jnp.concatenate([mask, latent], -1)), case["y"], LATENTS
    intrinsics = poses.transform_intrinsics(case["Ks"][:frames], (height, width))
    c2w = case["c2ws"][:frames].astype(np.float64)
    packed = cameras.clip_embedding(c2w, intrinsics, (height, width), stride[1], stride[0])
    yield "cam", np.moveaxis(packed, -1, 0)[None], case["cam"], Tolerance(atol=1e-5)

    texts = (pad_text(case[name], experts.config.text_len) for name in ("context", "context_null"))
    condition, unconditional = (
        Condition(text=text, control=jnp.asarray(packed)[None], mask=mask, image=latent) for text in texts
    )
    noise = channels_last(case["noise"])
    for solver in ("unipc", "dpmpp"):
        scales = Guidance(low=config["guide_scale_low"], high=config["guide_scale_high"])
        sample = SampleConfig(config["steps"], config["shift"], solver, scales)
        rows = solvers.make(solver, sample.steps, sample.shift)
        uses_high = rows.timestep >= config["boundary"] * config["num_train_timesteps"]
        yield f"{solver}/timesteps", rows.timestep, case[f"{solver}/timesteps"], EXACT
        yield f"{solver}/uses_high", uses_high, case[f"{solver}/uses_high"], EXACT
        state, found = solvers.start(noise), {"cond": [], "uncond": [], "latents": [noise]}
        for i, high in enumerate(uses_high):
            scale = jnp.float32(scales.high if high else scales.low)
            row = jax.tree.map(lambda a: jnp.asarray(a[i]), rows)  # noqa: B023 - used at once
            cond, uncond, state = one_step(experts, row, state, condition, unconditional, scale)
            for name, value in (("cond", cond), ("uncond", uncond), ("latents", state.x)):
                found[name].append(value)
        for name, values in found.items():
            ours = np.stack([channels_first(value) for value in values])
            yield f"{solver}/{name}", ours, case[f"{solver}/{name}"], LATENTS
        # The compiled sampler that everything uses, from the same noise, with both ways of guidance.
        batched = dataclasses.replace(scales, batched=solver == "dpmpp")
        video = bidirectional._clip(
            experts, vae, noise, condition, unconditional, dataclasses.replace(sample, guidance=batched)
        )
        yield f"{solver}/video", channels_first(video), case[f"{solver}/video"], VIDEO


CASES = {"i2v_e2e": end_to_end}
