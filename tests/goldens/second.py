"""Golden cases v2_*: the second generation's levels, cameras, few-step rollout and guided causal sampling."""

import jax
import jax.numpy as jnp
import numpy as np

from lingbot_jax.control import plucker, poses
from lingbot_jax.diffusion import flow, schedule, solvers
from lingbot_jax.diffusion.guidance import Guidance, combine, double
from lingbot_jax.models.attention import KV, Attend
from lingbot_jax.models.dit import Condition, WorldDiT
from lingbot_jax.rollout import causal, images
from lingbot_jax.rollout.cache import KVCache
from lingbot_jax.rollout.path import CameraPath, clip_length
from lingbot_jax.worlds.config import CausalConfig, SampleConfig
from tests.golden import EXACT, Case, Tolerance
from tests.goldens.causal import (
    OUTPUT,
    cached_pass,
    channels_first,
    channels_last,
    one_chunk,
    published_cache,
)
from tests.goldens.networks_dit import controlled, load_dit, pad_text

FREE_RUNNING = Tolerance(rtol=5e-6)  # the README's
CAMERA = Tolerance(atol=1e-5)
LEVEL = Tolerance(rtol=1e-6)
STRIDE = 4, 8  # video frames per latent frame, pixels per latent pixel


def fewstep(case: Case):
    """The levels of few-step sampling, looked up by timestep in two ways."""
    for prefix in case.prefixes():
        shift = float(prefix.removeprefix("shift").partition("_")[0])
        table = schedule.unipc(schedule.TRAIN_STEPS, shift)
        if "_" not in prefix:
            yield f"{prefix}/timesteps_all", table.timesteps, case[f"{prefix}/timesteps_all"], EXACT
            yield f"{prefix}/sigmas_all", table.sigmas, case[f"{prefix}/sigmas_all"], LEVEL
            continue
        indices = tuple(int(i) for i in case[f"{prefix}/indices"])
        few = schedule.fast(shift, indices)
        yield from _levels(case, few, shift, indices, f"{prefix}/")
        x, noise, velocity = (jnp.asarray(case[name]) for name in ("x0", "noise", "flow"))
        rows = lambda levels: [jnp.float32(level) for level in levels]
        x0 = jnp.stack([flow.x0_from_velocity(x, velocity, s) for s in rows(few.sigmas)])
        noised = jnp.stack([flow.add_noise(x, noise, s) for s in rows(few.renoise)])
        yield f"{prefix}/x0_of_flow", x0, case[f"{prefix}/x0_of_flow"], LEVEL
        yield f"{prefix}/add_noise", noised, case[f"{prefix}/add_noise"], LEVEL


def _levels(case: Case, few: schedule.FewSteps, shift: float, indices: tuple[int, ...], prefix: str = ""):
    table = schedule.unipc(schedule.TRAIN_STEPS, shift)
    found = [[schedule.lookup(table.timesteps, t, which) for t in few.timesteps] for which in (0, 1)]
    for name, ours, tolerance in (
        ("timesteps", few.timesteps, EXACT),
        ("position_sigma", table.sigmas[list(indices)], LEVEL),
        ("x0_index", found[0], EXACT),
        ("x0_sigma", few.sigmas, LEVEL),
        ("renoise_index", found[1], EXACT),
        ("renoise_sigma", few.renoise, LEVEL),
    ):
        yield f"{prefix}{name}", ours, case[f"{prefix}{name}"], tolerance


def control(case: Case):
    """From an image and poses of any size to whole chunks of the camera embedding."""
    base = case.config["height_org"], case.config["width_org"]
    time, space = STRIDE
    for p, run in zip(case.prefixes(), case.config["runs"], strict=True):
        image, c2w = case[f"{p}/image_u8"], poses.validate(case[f"{p}/c2ws"])
        height, width = images.fit(*image.shape[:2], run["max_area"], 2 * space)
        have = min(len(c2w), run["frame_num"])
        used = (have - 1) // time * time + 1
        frames = clip_length(have, None, time, run["chunk"], pad=False)
        intrinsics = poses.transform_intrinsics(case[f"{p}/Ks"], (height, width), base=base)
        path = CameraPath(c2w, intrinsics, np.zeros((len(c2w), 8), bool)).fitted(used).stretched(frames)
        latent = path.c2w[::time]
        relative = poses.relative(latent, "previous", "max_norm")
        packed = plucker.control(relative, path.intrinsics[:1], None, "cam", height, width, space)
        t, h, w, _ = packed.shape
        tokens = run["chunk"] * h * w // 4
        dims = [used, t, h, w, height, width, tokens, run["chunk"], frames]
        yield f"{p}/dims", dims, case[f"{p}/dims"], EXACT
        yield f"{p}/current_start", np.arange(0, t * h * w // 4, tokens), case[f"{p}/current_start"], EXACT
        yield f"{p}/tgt_indices", np.linspace(0, used - 1, frames)[::time], case[f"{p}/tgt_indices"], CAMERA
        yield f"{p}/interp", latent, case[f"{p}/interp"], CAMERA
        yield f"{p}/rel", relative, case[f"{p}/rel"], CAMERA
        yield f"{p}/Ks_row", path.intrinsics[0], case[f"{p}/Ks_row"], Tolerance(rtol=1e-6)
        yield f"{p}/packed", packed, case[f"{p}/packed"][0].transpose(1, 2, 3, 0), CAMERA
        mask = np.zeros((time, t, h, w))
        mask[:, 0] = 1
        yield f"{p}/mask", mask, case[f"{p}/mask"], EXACT
        first = images.resize(image, height, width).transpose(2, 0, 1)
        yield f"{p}/pixels_first_frame", first, case[f"{p}/pixels_first_frame"], CAMERA


class Rollout:
    """What the rollouts of a case have in common: network, conditions of chunks, cache."""

    def __init__(self, case: Case, settings: CausalConfig):
        self.model, self.settings = load_dit(case.config, case.weights()), settings
        self.frames, self.tokens = case.config["frames"], case.config["frame_seqlen"]
        self.chunks = self.frames // settings.chunk
        self.size = case.config["H"], case.config["W"]
        m = self.model.config.mask_channels
        y, camera = channels_last(case["y"]), channels_last(case["cam"])
        text = pad_text(case["context"], self.model.config.text_len)
        self.whole = Condition(text=text, control=camera, mask=y[None, ..., :m], image=y[None, ..., m:])

    def cut(self, latents: jax.Array, i: int) -> jax.Array:
        """Chunk i of `b t h w c`."""
        return latents[:, i * self.settings.chunk : (i + 1) * self.settings.chunk]

    def condition(self, i: int) -> Condition:
        part = {name: self.cut(getattr(self.whole, name), i) for name in ("control", "mask", "image")}
        return Condition(text=self.whole.text, **part)

    def empty(self, rows: int = 1) -> KVCache:
        layout = causal.cache_layout(self.settings, self.model.config, *self.size, frames=self.frames)
        return KVCache.empty(self.model.config, layout, rows)


def fast(case: Case):
    """v2_causal_fast_*: every pass fed with the golden latents, then the chunks as play generates them."""
    config = case.config
    window = config["local_attn_size"]
    settings = CausalConfig(
        chunk=config["chunk"],
        window=None if window == -1 else window,
        sink=config["sink_size"],
        positions="absolute",
        levels=tuple(config["timesteps_index"]),
        shift=config["shift"],
        context_noise=config["context_noise"],
    )
    few, made = settings.few_steps(), Rollout(case, settings)
    yield from _levels(case, few, settings.shift, settings.levels)
    start, renoise = channels_last(case["noise"])[None], channels_last(case["renoise"])
    inputs, clean = channels_last(case["latent_in"]), channels_last(case["x0_last"])

    flows, blocks, ends, cache = [], [], [], made.empty()
    for i in range(made.chunks):
        condition, passes = made.condition(i), []
        xs = [made.cut(start, i), *(x[None] for x in inputs[i]), clean[i][None]]
        for x, level in zip(xs, [*few.timesteps, settings.context_noise], strict=True):
            timestep = jnp.full(x.shape[:2], level, jnp.float32)
            velocity, block, kv = cached_pass(made.model, cache, x, timestep, condition)
            flows.append(velocity[0])
            passes.append(block)
        if i % config["keep_block0"] == 0:
            blocks.append(jnp.stack(passes))
        found = published_cache(made.model, cache, kv)
        ends.append(((i + 1) * settings.chunk * made.tokens, found[0].shape[1]))
        if i in config["keep_cache"]:
            yield from _caches(case, "cache", i, found)
        cache = cache.write(kv, made.model.config)
    yield "flow", channels_first(jnp.stack(flows)).reshape(case["flow"].shape), case["flow"], OUTPUT
    yield "block0_out", jnp.stack(blocks), case["block0_out"], OUTPUT
    yield "end_indices", np.array(ends), case["end_indices"], EXACT
    tokens = settings.chunk * made.tokens
    yield "current_start", np.arange(made.chunks) * tokens, case["current_start"], EXACT

    cache, free, seen = made.empty(), [], []
    for i in range(made.chunks):
        draws = jnp.concatenate([made.cut(start, i)[None], renoise[i][:, None]])
        seen.append(_inputs(made, cache, made.condition(i), draws, few))
        latents, cache = one_chunk(made.model, cache, made.condition(i), draws, config=settings)
        free.append(latents[0])
    last = channels_first(jnp.stack(free))
    yield "latent_in", channels_first(jnp.stack(seen)), case["latent_in"], FREE_RUNNING
    yield "x0_last", last, case["x0_last"], FREE_RUNNING
    yield "latents", np.concatenate(list(last), axis=1), case["latents"], FREE_RUNNING


def _inputs(made: Rollout, cache: KVCache, condition: Condition, draws: jax.Array, few: schedule.FewSteps):
    """The latents that passes 1, 2, ... of a free-running chunk see, `s-1 t h w c`."""
    x, seen = draws[0], []
    for i in range(len(draws) - 1):
        timestep = jnp.full(x.shape[:2], few.timesteps[i], jnp.float32)
        velocity, _, _ = cached_pass(made.model, cache, x, timestep, condition)
        x0 = flow.x0_from_velocity(x, velocity, jnp.float32(few.sigmas[i]))
        x = flow.add_noise(x0, draws[i + 1], jnp.float32(few.renoise[i + 1]))
        seen.append(x[0])
    return jnp.stack(seen)


def _caches(case: Case, prefix: str, chunk: int, found: list[np.ndarray]):
    for name, ours in zip(("k", "v"), found, strict=True):
        golden = case[f"{prefix}_{name}_block0_chunk{chunk}"]
        whole = np.zeros_like(golden)  # the published cache is zero where nothing was written yet
        whole[:, : ours.shape[1]] = ours
        yield f"{prefix}_{name}_block0_chunk{chunk}", whole, golden, OUTPUT


def pretrain(case: Case):
    """v2_causal_pretrain*: guided UniPC in every chunk, a cache per branch."""
    config = case.config
    scale = config["guide_scale"]
    sample = SampleConfig(
        config["steps"], config["shift"], "unipc", Guidance(low=scale, high=scale), negative_prompt="stored"
    )
    settings = CausalConfig(
        chunk=config["chunk"],
        window=None,
        sink=0,
        positions="absolute",
        sample=sample,
        context_noise=config["context_noise"],
    )
    made = Rollout(case, settings)
    table = solvers.make("unipc", sample.steps, sample.shift)
    yield "timesteps", table.timestep, case["timesteps"], EXACT
    sigmas = schedule.unipc(sample.steps, sample.shift).sigmas
    yield "sigmas", sigmas, case["sigmas"], LEVEL
    negative = pad_text(case["context_null"], made.model.config.text_len)
    noise, kept = channels_last(case["noise"])[None], [int(i) for i in case["kept_steps"]]
    steps, branches, clean, cache = [], [], [], made.empty(2)
    for i in range(made.chunks):
        condition = made.condition(i)
        both = double(condition, Condition(negative, condition.control, condition.mask, condition.image))
        state, own = solvers.start(made.cut(noise, i)), []
        trajectory = [state.x[0]]
        for n in range(sample.steps):
            velocities = _pass(made.model, cache, state.x, table.timestep[n], both)[0]
            if n in kept:
                own.append(velocities)
            guided = combine(velocities[:1], velocities[1:], scale)
            state = solvers.step(jax.tree.map(lambda a, n=n: jnp.asarray(a[n]), table), state, guided)
            trajectory.append(state.x[0])
        steps.append(jnp.stack(trajectory))
        branches.append(jnp.stack(own))
        velocities, kv = _pass(made.model, cache, state.x, settings.context_noise, both)
        clean.append(velocities)
        if i in config["keep_cache"]:
            for row, name in enumerate(("cond", "uncond")):
                one = lambda x, row=row: x[:, row : row + 1]
                held = KVCache(one(cache.keys), one(cache.values), cache.frames, cache.count, cache.layout)
                found = published_cache(made.model, held, KV(one(kv.keys), one(kv.values)))
                yield from _caches(case, f"cache_{name}", i, found)
        cache = cache.write(kv, made.model.config)
    yield "latents", channels_first(jnp.stack(steps)), case["latents"], OUTPUT
    for row, name in enumerate(("cond", "uncond")):
        yield name, channels_first(jnp.stack(branches)[:, :, row]), case[name], OUTPUT
        yield f"clean_{name}", channels_first(jnp.stack(clean)[:, row]), case[f"clean_{name}"], OUTPUT
    tokens = settings.chunk * made.tokens
    yield "current_start", np.arange(made.chunks) * tokens, case["current_start"], EXACT

    cache, chunks = made.empty(2), []
    for i in range(made.chunks):  # as a session samples them
        condition = made.condition(i)
        both = double(condition, Condition(negative, condition.control, condition.mask, condition.image))
        latents, cache = one_chunk(made.model, cache, both, made.cut(noise, i)[None], config=settings)
        chunks.append(latents[0])
    yield "result", channels_first(jnp.concatenate(chunks)), case["result"], OUTPUT


@jax.jit
def _pass(model: WorldDiT, cache: KVCache, x: jax.Array, timestep: jax.Array, both: Condition):
    """Velocities of both branches at one latent, and their keys and values."""
    attend, positions = causal.attend_cached(model, cache, Attend()), cache.positions(x.shape[1])
    x = jnp.concatenate([x, x])
    level = jnp.full(x.shape[:2], timestep, jnp.float32)
    return model(x, level, both, attend=attend, positions=positions, return_kv=True)


def transformer(case: Case):
    """v2_dit_*: the networks of v1 with an empty cache; what the pass writes into it."""
    yield from controlled(case)
    model = load_dit(case.config, case.weights())
    settings = CausalConfig(chunk=case.config["F"], window=None, sink=0, positions="absolute")
    latents = channels_last(case["x"])[None]
    height, width = latents.shape[2:4]
    layout = causal.cache_layout(settings, model.config, height, width, frames=settings.chunk)
    cache, m = KVCache.empty(model.config, layout, 1), model.config.mask_channels
    y = channels_last(case["y"])[None]
    text = pad_text(case["context"], model.config.text_len)
    condition = Condition(text, channels_last(case["cam"]), y[..., :m], y[..., m:])
    for prefix, levels in (
        ("scalar", np.full(settings.chunk, case["t_scalar"][0])),
        ("tokens", case["t_frames"]),
    ):
        timestep = jnp.asarray(levels, jnp.float32)[None]
        _, _, kv = cached_pass(model, cache, latents, timestep, condition)
        for name, ours in zip(("k", "v"), published_cache(model, cache, kv), strict=True):
            yield f"{prefix}/cache_{name}_block0", ours, case[f"{prefix}/cache_{name}_block0"], OUTPUT


CASES = {
    "v2_fewstep": fewstep,
    "v2_control": control,
    "v2_dit": transformer,
    "v2_causal_fast": fast,
    "v2_causal_pretrain": pretrain,
}
