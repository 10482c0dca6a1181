"""Golden cases of the Wan VAE (vae_z4, vae_z16) and of the umT5 encoder (umt5)."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from lingbot_jax.convert import names_text, names_vae
from lingbot_jax.convert.read import Arrays, fill
from lingbot_jax.models import params, text
from lingbot_jax.models.config import UMT5Config, VAEConfig
from lingbot_jax.models.text import UMT5
from lingbot_jax.models.vae import WanVAE
from tests.convert.published import tokenizer
from tests.golden import EXACT, Case, Tolerance

# About 10 times the change seen when every product is evaluated in float64 (golden README).
VAE = Tolerance(rtol=5e-5)
TEXT = Tolerance(rtol=2e-5)


def channels_last(video: np.ndarray) -> np.ndarray:
    """`b c t h w` of the cases to our `b t h w c`."""
    return np.moveaxis(video, 1, -1)


def load_vae(config: dict, weights: dict[str, np.ndarray], mean: np.ndarray, std: np.ndarray) -> WanVAE:
    """A float32 WanVAE with published weights; every tensor must be used."""
    assert not config["attn_scales"], config["attn_scales"]
    ours = VAEConfig(
        width=config["dim"],
        mults=tuple(config["dim_mult"]),
        blocks=config["num_res_blocks"],
        time_strides=tuple(config["temperal_downsample"]),
        channels=config["z_dim"],
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
    )
    template = params.abstract(lambda key: WanVAE(ours, key))
    return fill(template, names_vae.published(ours), Arrays(weights))


# The stream functions with the tensors of the middle beside them: one program each for all calls.
@jax.jit
def encode_group(vae: WanVAE, frames: jax.Array, cache, opening: jax.Array):
    return vae.encoder(frames, cache, opening)


@jax.jit
def decode_group(vae: WanVAE, latent: jax.Array, cache, opening: jax.Array):
    mean, std = np.float32(vae.config.mean), np.float32(vae.config.std)
    raw = vae.unmoments(latent * std + mean)
    middle, _ = vae.decoder.bottom(raw, cache, opening)
    frames, cache = vae.decoder(raw, cache, opening)
    return frames, middle, cache


def _vae(case: Case) -> Iterator:
    vae = load_vae(case.config, case.weights(), case["mean"], case["std"])
    video = channels_last(case["video"])
    stride = vae.config.stride
    lengths = sorted(int(name.removeprefix("mu_T")) for name in case.names("mu_T"))

    for frames in lengths:
        # Chunks: the first frame fills the end of its group.
        filled = np.concatenate([np.zeros_like(video[:, : stride[0] - 1]), video[:, :frames]], axis=1)
        cache = vae.init_encode_stream(1, *video.shape[2:4])
        means = []
        for chunk, start in enumerate(range(0, filled.shape[1], stride[0])):
            group = filled[:, start : start + stride[0]]
            moments, cache = encode_group(vae, group, cache, jnp.asarray(chunk == 0))
            name = f"enc_chunk{chunk}_T{frames}"
            yield name, moments, channels_last(case[name]), VAE
            means.append(vae.moments(moments)[..., : vae.config.channels])
        ours = (jnp.concatenate(means, axis=1) - case["mean"]) / case["std"]
        if frames == lengths[-1]:
            ours = jax.jit(WanVAE.encode)(vae, video[:, :frames])
        yield f"mu_T{frames}", ours, channels_last(case[f"mu_T{frames}"]), VAE

    for which, latents in (("mu", case[f"mu_T{lengths[-1]}"]), ("rand", case["z_rand"])):
        latents = channels_last(latents)
        cache = vae.init_stream(1, *latents.shape[2:4])
        counts, whole = [], []
        for chunk in range(latents.shape[1]):
            frames, middle, cache = decode_group(
                vae, latents[:, chunk : chunk + 1], cache, jnp.asarray(chunk == 0)
            )
            frames = frames[:, -1:] if chunk == 0 else frames
            golden = channels_last(case[f"dec_{which}_chunk{chunk}"])
            yield f"dec_{which}_chunk{chunk}", frames, golden, VAE
            yield f"dec_{which}_mid{chunk}", middle, channels_last(case[f"dec_{which}_mid{chunk}"]), VAE
            counts.append(frames.shape[1])
            whole.append(golden)
        yield f"dec_{which}_frames", counts, case[f"dec_{which}_frames"], EXACT
        clipped = np.clip(np.concatenate(whole, axis=1), -1, 1)
        yield f"dec_{which}_whole", jax.jit(WanVAE.decode)(vae, latents), clipped, VAE


def load_umt5(config: dict, weights: dict[str, np.ndarray]) -> UMT5:
    """A float32 encoder with published weights; every tensor must be used."""
    assert not config["shared_pos"]
    ours = UMT5Config(
        vocab=config["vocab"],
        dim=config["dim"],
        heads=config["num_heads"],
        head_dim=config["dim_attn"] // config["num_heads"],
        ffn=config["dim_ffn"],
        layers=config["num_layers"],
        buckets=config["num_buckets"],
        max_distance=config["max_dist"],
        eps=config["eps"],
        length=config["L"],
        dtype="float32",
    )
    template = params.abstract(lambda key: UMT5(ours, key))
    return fill(template, names_text.published(), Arrays(weights))


def _umt5(case: Case) -> Iterator:
    model = load_umt5(case.config, case.weights())
    ids, mask = jnp.asarray(case["ids"]), jnp.asarray(case["mask"]) != 0
    forward = jax.jit(UMT5.__call__)
    yield "out", forward(model, ids, mask), case["out"], TEXT
    encoded = jax.jit(text.UMT5Encoder(model, tokenizer()))(text.TextTokens(ids, mask))
    yield "out_zero_padded", encoded, case["out_zero_padded"], TEXT
    yield "out_nomask_first", forward(model, ids[:1]), case["out_nomask_first"], TEXT
    first = jax.tree.map(lambda leaf: leaf[0], model.blocks)
    yield "block0_out", first(model.embedding[ids], mask), case["block0_out"], TEXT
    places = np.arange(ids.shape[1])
    offsets = places[None, :] - places[:, None]
    yield "bucket", text.position_buckets(offsets, model.config), case["bucket"], EXACT
    yield "rel_bucket", text.position_buckets(case["rel"], model.config), case["rel_bucket"], EXACT
    golden = case["pos_bias_block0"]
    bias = first.position_bias(ids.shape[1])[None, :, : golden.shape[2]]
    yield "pos_bias_block0", bias, golden, EXACT


CASES = {"vae": _vae, "umt5": _umt5}
