"""Stage `causal`: the loss by hand, what teaches what, masks that agree with the cache, text by interval, a run."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.data import schema
from lingbot_jax.diffusion.guidance import Guidance
from lingbot_jax.diffusion.schedule import euler
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.config import NgramConfig
from lingbot_jax.models.dit import Condition
from lingbot_jax.models.text import HashedNgramEncoder
from lingbot_jax.rollout import causal as rollout
from lingbot_jax.rollout.cache import KVCache
from lingbot_jax.rollout.sample import denoise
from lingbot_jax.rollout.trajectory import TrajectoryConfig, trajectory
from lingbot_jax.training.config import TaskConfig
from lingbot_jax.training.objectives import Constants
from lingbot_jax.training.objectives import causal as objective
from lingbot_jax.training.objectives.causal import (
    block_causal_velocity,
    causal_loss,
    corrupted,
    draw_levels,
    weighted_loss,
)
from lingbot_jax.training.post_training import ForcingConfig
from lingbot_jax.training.start import objective_of, read_origins
from lingbot_jax.worlds.clips import Encoded, interval_middles, prepare
from lingbot_jax.worlds.condition import Camera, Conditioning
from lingbot_jax.worlds.config import CausalConfig, SampleConfig
from tests.rollout.worlds import TINY, TINY_WORLD, network
from tests.training import micro

CAUSAL = CausalConfig(chunk=2, window=4, sink=0, schedule="warped", levels=(1000, 500), shift=3.0)
H, W, FRAMES = 2, 4, 6
RNG = np.random.default_rng(0)
NULL = jnp.zeros((1, TINY.text_len, TINY.text_dim))


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def latents(frames: int = FRAMES) -> jax.Array:
    return draw(1, frames, H, W, TINY.latent_channels)


def condition(frames: int = FRAMES, texts: int | None = None) -> Condition:
    lead = () if texts is None else (texts,)
    return Condition(
        text=draw(1, *lead, TINY.text_len, TINY.text_dim),
        control=draw(1, frames, H, W, TINY.control_channels),
        mask=draw(1, frames, H, W, TINY.mask_channels),
        image=latents(frames),
    )


def test_loss_is_sigma_squared_times_the_velocity_error():
    error = jnp.full((1, 3, 1, 1, 2), 2.0)
    sigma = jnp.asarray([[0.5, 0.9, 0.0]])
    loss, metrics = weighted_loss(error, sigma, "x0")
    np.testing.assert_allclose(loss, 4 * (0.25 + 0.81) / 3, rtol=1e-6)
    assert float(metrics["loss_noisy"].sum) == 4.0 and float(metrics["loss_noisy"].count) == 1
    np.testing.assert_allclose(weighted_loss(error, sigma, "velocity")[0], 4 * 2 / 3, rtol=1e-6)


def test_levels_are_those_of_play_and_shared_by_a_chunk():
    config = dataclasses.replace(CAUSAL, context_noise=10.0)
    step, sigma, timestep = draw_levels(jax.random.key(0), 2000, 6, config, clean=0.25)
    few = config.few_steps()
    pairs, counts = np.unique(np.stack([sigma, timestep], -1).reshape(-1, 2), axis=0, return_counts=True)
    wanted = sorted([(0.0, 10.0), *zip(few.sigmas, few.timesteps, strict=True)])
    np.testing.assert_allclose(pairs, wanted, rtol=1e-6)
    np.testing.assert_allclose(counts / counts.sum(), [0.25, 0.375, 0.375], atol=0.02)
    assert (sigma[:, ::2] == sigma[:, 1::2]).all(), "the frames of a chunk share their level"
    assert (sigma[:, 0] != sigma[:, 2]).any(), "chunks have levels of their own"
    assert ((step == 2) == (sigma == 0)).all() and (
        np.float32(few.sigmas)[step[step < 2]] == sigma[step < 2]
    ).all()
    assert (draw_levels(jax.random.key(0), 8, 6, config, clean=0.0)[1] > 0).all()


def test_a_clean_chunk_teaches_through_its_keys_and_values_alone():
    """Chunk 0 is at t = 0, chunk 1 noisy. What reaches the latents of chunk 0, reached its tokens."""
    model, told = network(TINY), condition(4)
    x, target = latents(4), latents(4)
    sigma = jnp.asarray([[0.0, 0.0, 0.5, 0.5]])

    def gradient(attend: Attend, config=CAUSAL, weighting="x0") -> np.ndarray:
        def loss(x):
            velocity = block_causal_velocity(model, x, 1000 * sigma, told, config, attend)
            return weighted_loss(velocity - target, sigma, weighting)[0]

        return np.abs(jax.jit(jax.grad(loss))(x)).max(axis=(0, 2, 3, 4))

    def no_gradient_to_clean_keys(q, k, v, mask):
        stop = lambda y: jnp.concatenate([jax.lax.stop_gradient(y[:, :2]), y[:, 2:]], axis=1)
        return Attend().kernel(q, stop(k), stop(v), mask)

    for weighting in ("x0", "velocity"):
        found = gradient(Attend(), weighting=weighting)
        assert (found[:2] > 1e-3 * found[2:].max()).all(), (
            "the clean chunk is taught by the noisy one after it"
        )
        found = gradient(Attend(kernel=no_gradient_to_clean_keys), weighting=weighting)
        assert (found[:2] == 0).all() and (found[2:] > 0).all(), "and through its keys and values alone"
    blind = dataclasses.replace(CAUSAL, window=2)
    assert (gradient(Attend(), blind)[:2] == 0).all(), "a chunk that nobody sees is not taught"


def cached_pass(model, cache, x, level, part):
    attend, positions = rollout.attend_cached(model, cache, Attend()), cache.positions(CAUSAL.chunk)
    return model(x, level, part, attend=attend, positions=positions, return_kv=True)


@pytest.mark.parametrize("window, sink", [(None, 0), (4, 1)])
def test_teacher_forcing_is_what_a_cache_of_the_clean_past_gives(window, sink):
    config = dataclasses.replace(CAUSAL, window=window, sink=sink, positions="absolute")
    model, told, clean, noisy = network(TINY), condition(), latents(), latents()
    level = draw_levels(jax.random.key(1), 1, FRAMES, config, 0.0)[2]
    velocity = jax.jit(block_causal_velocity, static_argnames="config")
    found = velocity(model, noisy, level, told, config, Attend(), past=clean)

    one_pass = jax.jit(cached_pass)
    cache = KVCache.empty(TINY, rollout.cache_layout(config, TINY, H, W, FRAMES), 1)
    for start in range(0, FRAMES, config.chunk):
        cut = lambda x, start=start: x[:, start : start + config.chunk]
        part = Condition(text=told.text, **{n: cut(getattr(told, n)) for n in ("control", "mask", "image")})
        wanted, _ = one_pass(model, cache, cut(noisy), cut(level), part)
        np.testing.assert_allclose(cut(found), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
        _, kv = one_pass(model, cache, cut(clean), jnp.zeros((1, config.chunk)), part)
        cache = cache.write(kv, TINY)


def test_text_of_the_second_interval_leaves_the_first_chunk_as_it_is():
    model, x, level = network(TINY), latents(), jnp.full((1, FRAMES), 700.0)
    told = condition(texts=3)
    other = dataclasses.replace(told, text=told.text.at[:, 1].add(1.0))
    one_text = dataclasses.replace(told, text=told.text[:, 0])
    run = jax.jit(
        lambda told, past=None: block_causal_velocity(model, x, level, told, CAUSAL, Attend(), past)
    )
    first, second, alone = (np.asarray(run(c)) for c in (told, other, one_text))
    assert (first[:, :2] == second[:, :2]).all(), "bit for bit"
    assert (first[:, 2:4] != second[:, 2:4]).any() and (first[:, 4:] != second[:, 4:]).any()
    np.testing.assert_allclose(first[:, :2], alone[:, :2], rtol=1e-5, atol=1e-6)
    # Teacher forcing has the clip twice, and each half its texts.
    past = latents()
    first, second = (np.asarray(run(c, past)) for c in (told, other))
    assert (first[:, :2] == second[:, :2]).all() and (first[:, 2:] != second[:, 2:]).any()


def test_every_interval_has_the_text_of_its_middle():
    # 13 frames are the latent frames 0 | 1-4 | 5-8 | 9-12.
    assert interval_middles(13, 4, 4).tolist() == [0, 2, 6, 10]
    assert interval_middles(13, 2, 4).tolist() == [2, 8]
    events = (schema.Event(0.0, 0.3, "rain"), schema.Event(0.25, 0.6, "snow"))
    assert schema.Captions("n", "s", events).at(np.array([0.0, 0.3, 0.6, 0.7])) == [
        "rain",
        "snow",
        "snow",
        "",
    ]

    texts = HashedNgramEncoder(NgramConfig(dim=8, length=6))
    rows = {"frames": np.zeros((1, 13, 16, 16, 3), np.uint8), "static": np.array(["a hall"])}
    rows["temporal"] = np.array([["rain"] * 5 + [""] * 8])
    rows |= {"c2w": np.tile(np.eye(4), (1, 13, 1, 1)), "keys": np.zeros((1, 13, 8), np.uint8)}
    rows["intrinsics"] = np.ones((1, 13, 4), np.float32)
    made = prepare(TINY_WORLD, texts, rows, np.ones(1), intervals=2).tokens
    wanted = texts.tokenize(["a hall rain", "a hall"])
    np.testing.assert_array_equal(made.values[0], wanted.values)
    np.testing.assert_array_equal(made.mask[0], wanted.mask)


def test_a_corrupted_past_has_a_little_noise_of_its_own_per_chunk():
    clean = jnp.ones((500, 4, 2, 4, 6))
    made = np.asarray(corrupted(jax.random.key(0), clean, CAUSAL, 0.4))
    level = 1 - made.reshape(500, 2, -1).mean(-1)  # of (1 - s) + s n
    assert level.min() > -0.1 and level.max() < 0.5 and 0.19 < level.mean() < 0.21
    assert np.abs(level[:, 0] - level[:, 1]).mean() > 0.1


def causal_config(folder: pathlib.Path, run: str, **fields):
    world = micro.world_config(sample=None, causal=micro.CAUSAL)
    small = {"stage": "causal", "world": world, "curriculum": (), "steps": 4}
    small["tasks"] = TaskConfig(continuation=0.0)
    return micro.config(folder, run, **small | fields)


def test_student_starts_as_the_high_noise_expert_and_plays(folder, whole):
    temporal = TaskConfig(continuation=0.0, caption="temporal")
    config = causal_config(folder, "causal", init=whole.run, tasks=temporal)
    micro.train(config)
    losses = micro.losses_of(config)
    assert sorted(losses) == [1, 2, 3, 4] and all(np.isfinite(x) for x in losses.values())
    assert read_origins(config)["world"].name == "high"

    session = micro.opened(config).session()
    session.start(np.zeros((16, 32, 3), np.uint8), "A gradient.", seed=1)
    assert [session.step(np.eye(8)[0]).shape[0] for _ in range(4)] == [1, 4, 4, 4]


def test_what_does_not_fit_is_refused_in_one_line(folder, whole):
    make = lambda **fields: causal_config(folder, "refused", **{"init": whole.run} | fields)
    with pytest.raises(ConfigError, match=r"^world.causal = None: stage causal"):
        make(world=micro.world_config())
    with pytest.raises(ConfigError, match=r"^world.networks = \['high', 'low'\]: stage causal"):
        make(world=micro.world_config("high", "low", causal=CAUSAL))
    with pytest.raises(ConfigError, match=r"^tasks.caption = 'temporal': "):
        micro.config(folder, "refused", tasks=TaskConfig(caption="temporal"))
    world = micro.world_config(causal=CausalConfig(chunk=3))
    with pytest.raises(
        ConfigError, match=r"^config.data.frames = 13: gives 4 latent frames: .*causal.chunk = 3"
    ):
        micro.train(make(world=world))


NOTHING = Constants(jnp.zeros((1, micro.NETWORK.text_len, micro.NETWORK.text_dim)), None)


def encoded() -> Encoded:
    shape = (8, 4, 2, 4)
    camera = Camera(jnp.tile(jnp.eye(4), (8, 4, 1, 1)), jnp.full((8, 1, 4), 4.0), jnp.ones((8, 4, 4)))
    known = Conditioning(jnp.zeros((*shape, 4)), jnp.zeros((*shape, 8)))
    text = jnp.ones((8, micro.NETWORK.text_len, micro.NETWORK.text_dim))
    return Encoded(jnp.full((*shape, 8), 0.5), text, camera, known)


def test_loss_reads_the_clips():
    """The whole loss, with a stub that knows the clip: the error that is left is the one made by hand."""
    clips = encoded()

    class Stub:
        config = micro.NETWORK

        def __call__(self, noisy, timestep, told, *, attend, positions):
            assert attend.mask is not None and not attend.mask.is_full
            sigma = (timestep / 1000)[..., None, None, None]
            exact = (noisy - clips.latents) / jnp.where(sigma > 0, sigma, 1.0)
            return jnp.where(sigma > 0, exact + 3.0, 1e3)

    config = causal_config(micro.ROOT, "unused", init="unused")
    config = dataclasses.replace(config, forcing=ForcingConfig(weighting="velocity", clean=0.5))
    loss, _ = causal_loss(config, {"world": Stub()}, clips, NOTHING, jax.random.key(0), Attend())
    share = float(loss) / 9.0
    assert 0.2 < share < 0.8 and abs(share * 32 - round(share * 32)) < 1e-2, "clean chunks count as zero"


@pytest.mark.parametrize("experts", [("world",), ("high", "low")])
def test_trajectory_is_the_sampler_s_and_visits_the_student_s_levels(experts):
    """Euler steps from noise; where the student's levels are steps of them it is the same path."""
    levels = tuple(euler(4, 3.0).sigmas[:3])
    networks = {name: network(TINY, seed) for seed, name in enumerate(experts)}
    told, noise, null = condition(), latents(), draw(1, TINY.text_len, TINY.text_dim)
    how = TrajectoryConfig(steps=4, shift=3.0, guidance=2.0)
    states, end = jax.jit(trajectory, static_argnums=(1, 5, 6))(
        networks, 0.8, noise, told, null, levels, how, Attend()
    )
    own = SampleConfig(steps=4, shift=3.0, solver="euler", guidance=Guidance(2.0, 2.0))
    wanted = jax.jit(denoise, static_argnums=(1, 5))(networks, 0.8, noise, told, null, own, Attend())
    np.testing.assert_allclose(end, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(states[0], noise)
    # A level between two steps divides the first of them.
    between = jax.jit(trajectory, static_argnums=(1, 5, 6))(
        networks, 0.8, noise, told, null, (1.0, 0.93), how, Attend()
    )[0]
    np.testing.assert_allclose(between[1], noise + 0.7 * (states[1] - noise), rtol=1e-4, atol=1e-5)


def test_student_regresses_on_the_end_of_the_teacher_s_trajectory(monkeypatch):
    """The teacher's way is straight to a clip of its own: the error that is left is the student's, made by hand."""
    clips, own = encoded(), jnp.full((8, 4, 2, 4, 8), -0.25)

    class Student:
        config = micro.NETWORK

        def __call__(self, noisy, timestep, told, *, attend, positions):
            sigma = (timestep / 1000)[..., None, None, None]
            return (noisy - own) / jnp.where(sigma > 0, sigma, 1.0) + jnp.where(sigma > 0, 3.0, 1e3)

    def straight(networks, boundary, noise, told, null, levels, config, attend):
        assert (
            networks == {"high": "r h", "low": "r l"}
            and attend.mask is None
            and null.shape == told.text.shape
        )
        return jnp.stack([own + level * (noise - own) for level in levels]), own

    monkeypatch.setattr(objective, "trajectory", straight)
    how = ForcingConfig(method="ode", weighting="velocity", clean=0.5)
    teachers = micro.world_config("high", "low").networks
    config = causal_config(micro.ROOT, "unused", init="unused", forcing=how, teachers=teachers)
    (update,) = objective_of(config).updates(0)
    assert update.networks == ("world",) and update.reads == ("real_high", "real_low")
    networks = {"world": Student(), "real_high": "r h", "real_low": "r l"}
    loss, _ = update.loss(networks, clips, NOTHING, jax.random.key(0), Attend())
    share = float(loss) / 9.0
    assert 0.2 < share < 0.8 and abs(share * 32 - round(share * 32)) < 1e-2
