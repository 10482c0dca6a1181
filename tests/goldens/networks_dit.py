"""Golden cases of the transformer: dit_cam*, dit_act, dit_nocam."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lingbot_jax.control.plucker import CONTROL_CHANNELS
from lingbot_jax.convert.names import expand
from lingbot_jax.convert.names_dit import dit_table
from lingbot_jax.convert.read import Arrays, fill
from lingbot_jax.models import params, rope
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.dit import Condition, WorldDiT
from tests.golden import Case, Tolerance

# 20 times the change seen when every product is evaluated in float64 (golden README).
OUTPUT = Tolerance(rtol=2e-5)
GRADIENT = Tolerance(rtol=5e-5)


def dit_config(config: dict, weights: dict[str, np.ndarray]) -> DiTConfig:
    """Our config of a published one; control is there if the state dict has its embedding."""
    control = "none"
    if "patch_embedding_wancamctrl.weight" in weights:
        control = {n: name for name, n in CONTROL_CHANNELS.items()}[config["control_dim"]]
    return DiTConfig(
        dim=config["dim"],
        layers=config["num_layers"],
        heads=config["num_heads"],
        ffn=config["ffn_dim"],
        freq_dim=config["freq_dim"],
        text_dim=config["text_dim"],
        text_len=config["text_len"],
        latent_channels=config["out_dim"],
        image_condition=config["model_type"] == "i2v",
        mask_channels=config["in_dim"] - 2 * config["out_dim"] if config["model_type"] == "i2v" else 4,
        control=control,
        patch=tuple(config.get("patch_size", (1, 2, 2))),
        eps=config.get("eps", 1e-6),
        dtype="float32",
    )


def load_dit(config: dict, weights: dict[str, np.ndarray]) -> WorldDiT:
    """A float32 WorldDiT with published weights; every tensor must be used."""
    ours = dit_config(config, weights)
    return fill(params.abstract(lambda key: WorldDiT(ours, key)), dit_table(ours), Arrays(weights))


def channels_last(x: np.ndarray) -> jax.Array:
    """[c f h w] -> [1 f h w c]."""
    return jnp.asarray(np.moveaxis(x, 0, -1)[None])


def channels_first(x: jax.Array) -> np.ndarray:
    """[1 f h w c] -> [c f h w]."""
    return np.moveaxis(np.asarray(x[0]), -1, 0)


def pad_text(context: np.ndarray, length: int) -> jax.Array:
    """[n d] -> [1 length d] with zero rows, as the published model does inside."""
    return jnp.asarray(np.pad(context, ((0, length - len(context)), (0, 0)))[None])


def condition_of(case: Case, config: DiTConfig, suffix: str = "", control: bool = False) -> Condition:
    given = channels_last(case[f"y{suffix}"])
    return Condition(
        text=pad_text(case[f"context{suffix}"], config.text_len),
        control=channels_last(case["cam"][0]) if control else None,
        mask=given[..., : config.mask_channels],
        image=given[..., config.mask_channels :],
    )


@jax.jit
def taps(model: WorldDiT, latents, timestep, condition: Condition) -> dict[str, jax.Array]:
    """Intermediate tokens `1 n d` of a forward pass, and its output."""
    text, control = model.embed_text(condition.text), model.embed_control(condition.control)
    _, frames, height, width, _ = latents.shape
    _, rows, columns = model.config.patch
    table = rope.rotary(
        jnp.arange(frames),
        height // rows,
        width // columns,
        model.config.head_dim,
        model.config.rope_theta,
    )
    _, time = model.time(timestep if timestep.ndim == 3 else timestep[..., None])
    found = {"context_emb": text, "e0": time}
    x = found["block0_in"] = model.embed_latents(latents, model.embed_conditioning(condition))

    def body(x, block):
        own = (block.prepare_text(text), block.prepare_control(control))
        x, _ = block(x, time, *own, table, Attend(), None)
        return x, x

    found["blocklast_out"], every = jax.lax.scan(body, x, model.blocks)
    found |= {f"block{i}_out": x for i, x in enumerate(every)}
    if control is not None:
        found["cam_emb"] = control
    found = {name: y if name == "context_emb" else _join(y) for name, y in found.items()}
    return found | {"out": model(latents, timestep, condition)}


def _join(y: jax.Array) -> jax.Array:
    """[1 t p ...] -> [1 n ...]."""
    return y.reshape(1, -1, *y.shape[3:])


def controlled(case: Case):
    """dit_cam, dit_cam_b, dit_act: one sample with control, and the same weights without."""
    model = load_dit(case.config, case.weights())
    config = model.config
    latents = channels_last(case["x"])
    frames = latents.shape[1]
    condition = condition_of(case, config, control=True)
    tokens = jnp.asarray(case["t_tokens"]).reshape(1, frames, -1)
    scalar = jnp.full(tokens.shape, case["t_scalar"][0], jnp.float32)
    without = dataclasses.replace(condition, control=None)
    runs = {"scalar": (scalar, condition), "tokens": (tokens, condition), "nocam": (scalar, without)}
    for prefix, inputs in runs.items():
        found = taps(model, latents, *inputs)
        for name in ("out", "block0_in", "block0_out", "blocklast_out", "e0", "context_emb", "cam_emb"):
            if f"{prefix}/{name}" in case:
                ours = channels_first(found[name]) if name == "out" else found[name]
                if prefix == "scalar" and name == "e0":
                    ours = ours[:, :1]  # one row, equal for all tokens
                yield f"{prefix}/{name}", ours, case[f"{prefix}/{name}"], OUTPUT
    if "grad_w" in case:
        yield from gradients(case, model, latents, scalar[:, :, 0], condition)


def gradients(case: Case, model: WorldDiT, latents, timestep, condition: Condition):
    weight = channels_last(case["grad_w"])

    @jax.jit
    @jax.value_and_grad
    def loss(inputs):
        model, latents, condition = inputs
        return jnp.sum(model(latents, timestep, condition) * weight)

    value, (d_model, d_latents, d_condition) = loss((model, latents, condition))
    yield "scalar/loss", value, case["scalar/loss"], GRADIENT
    yield "scalar/grad_x", channels_first(d_latents), case["scalar/grad_x"], GRADIENT
    yield "scalar/grad_cam", channels_first(d_condition.control)[None], case["scalar/grad_cam"], GRADIENT
    flat = params.flat_params(d_model)
    slots = expand(dit_table(model.config), {name: p.shape for name, p in flat.items()})
    for name in case.names("scalar/grad/"):
        slot = slots[name.removeprefix("scalar/grad/")]
        ours = np.asarray(flat[slot.entry.ours])[... if slot.layer is None else slot.layer]
        yield name, slot.entry.to_published(ours)[0], case[name], GRADIENT


def ragged(case: Case):
    """dit_nocam: samples of different grids, each run alone; the published padded keys are masked."""
    model = load_dit(case.config, case.weights())
    length = case.config["seq_len"]
    timesteps = case["t_batch"]
    time, context = [], []
    rows = {name: [] for name in ("block0_in", "block0_out", "blocklast_out")}
    for i in range(len(timesteps)):
        latents = channels_last(case[f"x{i}"])
        frames = latents.shape[1]
        own = latents.shape[2] * latents.shape[3] * frames // np.prod(model.config.patch)
        condition = condition_of(case, model.config, str(i))
        found = taps(
            model, latents, jnp.asarray(timesteps[i : i + 1, :own]).reshape(1, frames, -1), condition
        )
        yield f"batch/out{i}", channels_first(found["out"]), case[f"batch/out{i}"], OUTPUT
        for name in rows:
            golden = case[f"batch/{name}"][i : i + 1, :own]  # rows past the own length are irrelevant
            yield f"batch/{name}[{i}]", found[name], golden, OUTPUT
        time.append(np.asarray(model.time(jnp.asarray(timesteps[i]))[1]))
        context.append(np.asarray(found["context_emb"][0]))
    yield "batch/e0", np.stack(time), case["batch/e0"], OUTPUT
    yield "batch/context_emb", np.stack(context), case["batch/context_emb"], OUTPUT

    latents = channels_last(case["x0"])
    own = case["x0"].shape[2] * case["x0"].shape[3] // np.prod(model.config.patch)
    timestep = jnp.full((1, latents.shape[1], own), case["t_single"][0], jnp.float32)  # as compiled above
    found = taps(model, latents, timestep, condition_of(case, model.config, "0"))
    yield "single/out", channels_first(found["out"]), case["single/out"], OUTPUT
    golden = case["single/block0_out"]
    assert golden.shape[1] == length
    own = found["block0_out"].shape[1]
    yield "single/block0_out", found["block0_out"], golden[:, :own], OUTPUT


CASES = {"dit_cam": controlled, "dit_act": controlled, "dit_nocam": ragged}
