"""Golden cases causal_kv_*, causal_train and causal_rollout: caches, masks and the few-step sampler."""

import jax
import jax.numpy as jnp
import numpy as np

from lingbot_jax.models import rope
from lingbot_jax.models.attention import KV, Attend
from lingbot_jax.models.dit import Condition, WorldDiT
from lingbot_jax.rollout import causal, masks
from lingbot_jax.rollout.cache import KVCache
from lingbot_jax.worlds.config import CausalConfig
from tests.golden import EXACT, Case, Tolerance
from tests.goldens.networks_dit import load_dit, pad_text

OUTPUT = Tolerance(rtol=2e-5)  # the README's, 40 times the change seen in float64


def channels_last(x: np.ndarray) -> jax.Array:
    """[... c t h w] -> [... t h w c]."""
    return jnp.asarray(np.moveaxis(x, -4, -1))


def channels_first(x: jax.Array) -> np.ndarray:
    """[... t h w c] -> [... c t h w]."""
    return np.moveaxis(np.asarray(x), -1, -4)


def text(case: Case, model: WorldDiT) -> Condition:
    rows = [pad_text(context, model.config.text_len) for context in case["context"]]
    return Condition(text=jnp.concatenate(rows))


def first_block(model: WorldDiT, latents, timestep, condition, attend: Attend, positions) -> jax.Array:
    """Tokens `b n d` after the first block."""
    config = model.config
    _, _, height, width, _ = latents.shape
    table = rope.rotary(
        positions, height // config.patch[1], width // config.patch[2], config.head_dim, config.rope_theta
    )
    first = lambda tree: jax.tree.map(lambda p: p[0], tree)
    context = attend.context and attend.context.layer(attend.context.keys[0], attend.context.values[0])
    block = first(model.blocks)
    x, _ = block(
        model.embed_latents(latents, model.embed_conditioning(condition)),
        model.time(timestep[..., None])[1],
        block.prepare_text(model.embed_text(condition.text)),
        block.prepare_control(model.embed_control(condition.control)),
        table,
        attend,
        context,
    )
    return x.reshape(x.shape[0], -1, x.shape[-1])


@jax.jit
def cached_pass(model: WorldDiT, cache: KVCache, latents, timestep, condition: Condition):
    """Velocity, tokens after block 0, keys and values, of the next chunk behind a cache."""
    attend = causal.attend_cached(model, cache, Attend())
    positions = cache.positions(latents.shape[1])
    velocity, kv = model(latents, timestep, condition, attend=attend, positions=positions, return_kv=True)
    return velocity, first_block(model, latents, timestep, condition, attend, positions), kv


def published_cache(model: WorldDiT, cache: KVCache, kv: KV) -> list[np.ndarray]:
    """Block 0 of the published cache after a chunk: sink, older frames in order, the chunk itself.

    Ours drops what the next chunk does not see as soon as it writes; so older frames come from the cache
    before writing, and the chunk's own from `kv`, rotated by their absolute positions.
    """
    order = np.argsort(np.asarray(cache.frames), kind="stable")
    order = [i for i in order if cache.frames[i] >= 0]
    t = kv.keys.shape[2] // cache.layout.tokens
    cut = lambda x: x.reshape(*x.shape[:2], t, cache.layout.tokens, *x.shape[3:])
    table = rope.rotary(
        cache.count + jnp.arange(t),
        cache.layout.rows,
        cache.layout.columns,
        model.config.head_dim,
        model.config.rope_theta,
    )
    keys, values = rope.rotate(cut(kv.keys), table), cut(kv.values)
    joined = []
    for old, new, permute in ((cache.keys, keys, rope.interleave), (cache.values, values, lambda x: x)):
        frames = jnp.concatenate([old[0][:, np.array(order, int)], new[0]], axis=1)
        joined.append(np.asarray(permute(frames)).reshape(frames.shape[0], -1, *frames.shape[3:]))
    return joined


def cached(case: Case):
    """causal_kv_*: every pass of every chunk, and the cache after each."""
    config, model = case.config, load_dit(case.config, case.weights())
    condition = text(case, model)
    noisy, clean = channels_last(case["x_noisy"]), channels_last(case["x_clean"])
    chunks, _, batch, t, height, width, _ = noisy.shape
    windowed = config["local_attn_size"] != -1
    window = config["local_attn_size"] if windowed else None
    settings = CausalConfig(chunk=t, window=window, sink=config["sink_size"], positions="absolute")
    layout = causal.cache_layout(settings, model.config, height, width, frames=chunks * t)
    cache = KVCache.empty(model.config, layout, batch)
    out_noisy, out_clean, tokens, ends = [], [], [], []
    tokens_end = 0
    for i in range(chunks):
        passes = []
        for x, level in zip(noisy[i], case["timesteps"], strict=True):
            timestep = jnp.full((batch, t), level, jnp.float32)
            velocity, block, _ = cached_pass(model, cache, x, timestep, condition)
            out_noisy.append(velocity)
            passes.append(block)
        velocity, block, kv = cached_pass(model, cache, clean[i], jnp.zeros((batch, t)), condition)
        out_clean.append(velocity)
        tokens.append(jnp.stack([*passes, block]))
        after = cache.write(kv, model.config)
        found = published_cache(model, cache, kv)
        for name, ours in zip(("k", "v"), found, strict=True):
            golden = case[f"cache_{name}_block0_chunk{i}"]
            whole = np.zeros_like(golden)  # the published cache is zero where nothing was written yet
            whole[:, : ours.shape[1]] = ours
            yield f"cache_{name}_block0_chunk{i}", whole, golden, OUTPUT
        cache, tokens_end = after, tokens_end + t * layout.tokens
        ends.append((tokens_end, found[0].shape[1]))
    golden = case["out_noisy"]
    yield "out_noisy", channels_first(jnp.stack(out_noisy)).reshape(golden.shape), golden, OUTPUT
    yield "out_clean", channels_first(jnp.stack(out_clean)), case["out_clean"], OUTPUT
    yield "block0_out", jnp.stack(tokens), case["block0_out"], OUTPUT
    yield "end_indices", np.array(ends), case["end_indices"], EXACT


@jax.jit
def masked_pass(model: WorldDiT, latents, timestep, condition: Condition, attend: Attend, positions):
    velocity = model(latents, timestep, condition, attend=attend, positions=positions)
    return velocity, first_block(model, latents, timestep, condition, attend, positions)


def trained(case: Case):
    """causal_train: the forward pass without cache under the training masks."""
    config, model = case.config, load_dit(case.config, case.weights())
    condition, x, t = text(case, model), channels_last(case["x"]), case["t"]
    frames, p, chunk, window = x.shape[1], config["frame_seqlen"], config["chunk"], config["local"]

    def run(x, t, mask, positions):
        timestep = jnp.asarray(t, jnp.float32)
        return masked_pass(model, x, timestep, condition, Attend(mask=mask), positions)

    for prefix, limit in (("full", None), ("local", window)):
        mask = masks.chunks(frames, chunk, p, window=limit)
        velocity, block = run(x, t, mask, jnp.arange(frames))
        yield f"{prefix}/mask", mask.dense(), case[f"{prefix}/mask"], EXACT
        yield f"{prefix}/out", channels_first(velocity), case[f"{prefix}/out"], OUTPUT
        yield f"{prefix}/block0_out", block, case[f"{prefix}/block0_out"], OUTPUT

        prefix = f"first_{prefix}"
        mask = masks.chunks(frames + 1, chunk, p, window=limit, first_frame=True)
        velocity, _ = run(channels_last(case["x_first"]), case["t_first"], mask, jnp.arange(frames + 1))
        yield f"{prefix}/mask", mask.dense(), case[f"{prefix}/mask"], EXACT
        yield f"{prefix}/out", channels_first(velocity), case[f"{prefix}/out"], OUTPUT

    mask = masks.teacher_forcing(frames, chunk, p)
    yield "tf/mask", mask.dense(), case["tf/mask"], EXACT
    both = jnp.concatenate([channels_last(case["clean_x"]), x], axis=1)
    positions = jnp.tile(jnp.arange(frames), 2)
    for name, clean_t in (("tf/out", np.zeros_like(t)), ("tf/out_aug", case["tf/aug_t"])):
        velocity, _ = run(both, np.concatenate([clean_t, t], axis=1), mask, positions)
        yield name, channels_first(velocity[:, frames:]), case[name], OUTPUT


one_chunk = jax.jit(causal.generate_chunk, static_argnames="config", donate_argnames="cache")


def sampled(case: Case):
    """causal_rollout: the few-step sampler, chunk after chunk."""
    config, model = case.config, load_dit(case.config, case.weights())
    assert config["warp_denoising_step"]
    noise = jnp.moveaxis(jnp.asarray(case["noise"]), 2, -1)
    _, frames, height, width, _ = noise.shape
    windows = {"full": {"window": None}}
    windows["sink"] = {"window": config["sink"]["local_attn_size"], "sink": config["sink"]["sink_size"]}
    for prefix, window in windows.items():
        causal_config = CausalConfig(
            **{"sink": 0, **window},
            chunk=config["chunk"],
            positions="absolute",
            schedule="warped",
            levels=tuple(config["denoising_step_list"]),
            shift=config["shift"],
            context_noise=config["context_noise"],
        )
        few = causal_config.few_steps()
        if prefix == "full":
            yield "denoising_timesteps", few.timesteps, case["denoising_timesteps"], Tolerance(rtol=1e-6)
        chunks, steps = frames // config["chunk"], len(few.timesteps)
        renoise = jnp.moveaxis(jnp.asarray(case[f"{prefix}/renoise"]), 2, -1)
        shape = (1, config["chunk"], height, width, noise.shape[-1])
        start, later = noise.reshape(chunks, 1, *shape), renoise.reshape(chunks, steps - 1, *shape)
        draws = jnp.concatenate([start, later], axis=1)
        layout = causal.cache_layout(causal_config, model.config, height, width, frames=frames)
        cache, made = KVCache.empty(model.config, layout, 1), []
        for chunk in draws:
            latents, cache = one_chunk(model, cache, text(case, model), chunk, config=causal_config)
            made.append(latents)
        ours = jnp.moveaxis(jnp.concatenate(made, 1), -1, 2)
        yield f"{prefix}/latents", ours, case[f"{prefix}/latents"], OUTPUT


CASES = {"causal_kv": cached, "causal_train": trained, "causal_rollout": sampled}
