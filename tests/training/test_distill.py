"""Stage `distill`: rollouts against play, where the gradient goes, windows, replay, turns of the experts, resume."""

import dataclasses
import functools
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.control import poses
from lingbot_jax.diffusion.distill import ScoreConfig
from lingbot_jax.models import params
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.discriminator import Discriminator, DiscriminatorConfig
from lingbot_jax.models.dit import WorldDiT
from lingbot_jax.planning.programs import longest_rollouts
from lingbot_jax.rollout import causal
from lingbot_jax.rollout.self_rollout import condition_of, roll
from lingbot_jax.training.config import TaskConfig
from lingbot_jax.training.goodput import Goodput
from lingbot_jax.training.objectives import Constants, Mean
from lingbot_jax.training.objectives.distill import (
    critic_loss,
    draw_rollout,
    replayed,
    score_window,
    student_loss,
    through_cache,
    through_replay,
)
from lingbot_jax.training.post_training import DistillConfig
from lingbot_jax.training.report import NonFiniteLoss, Report
from lingbot_jax.training.start import objective_of
from lingbot_jax.worlds import storage
from lingbot_jax.worlds.clips import Encoded
from lingbot_jax.worlds.condition import Camera, Conditioning, camera_window
from lingbot_jax.worlds.config import CausalConfig, PoseConfig
from tests.bench import distill_memory
from tests.rollout.worlds import TINY, codec, network
from tests.training import micro

pytestmark = pytest.mark.long

CAUSAL = CausalConfig(chunk=2, window=6, sink=2, schedule="warped", levels=(1000, 500), shift=3.0)
H, W, FRAMES = 2, 4, 12  # 6 chunks
KEY = jax.random.key(3)


def clips(seed: int = 0, texts: int | None = None, batch: int = 2) -> Encoded:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=(batch, *shape)), jnp.float32)
    c2w = np.tile(np.eye(4), (batch, FRAMES, 1, 1))
    c2w[..., :3, :3] = np.linalg.qr(rng.normal(size=(batch, FRAMES, 3, 3)))[0]
    c2w[..., :3, 3] = rng.normal(size=(batch, FRAMES, 3))
    camera = Camera(jnp.float32(c2w), jnp.full((batch, 1, 4), 8.0), jnp.abs(draw(FRAMES, 4)))
    known = Conditioning(draw(FRAMES, H, W, TINY.mask_channels), draw(FRAMES, H, W, TINY.latent_channels))
    lead = () if texts is None else (texts,)
    text = draw(*lead, TINY.text_len, TINY.text_dim)
    return Encoded(draw(FRAMES, H, W, TINY.latent_channels), text, camera, known)


def chunk_by_chunk(given: Encoded, chunks: int, exit_step: int) -> np.ndarray:
    """The rollout as a loop on the host over the function that play compiles."""
    layout = causal.cache_layout(CAUSAL, TINY, H, W)
    cache, found = causal.KVCache.empty(TINY, layout, 2), []
    step = jax.jit(causal.denoise_chunk, static_argnames="config")
    for i in range(chunks):
        told = condition_of(TINY, given, jnp.arange(2) + 2 * i, 2)
        noise = causal.draw_noise(KEY, i, (2, 2, H, W, TINY.latent_channels), 2)
        made = step(network(), cache, told, noise, CAUSAL, exit_step=jnp.int32(exit_step))
        cache = cache.write(made.kv, TINY)
        found.append(made.latents)
    return np.concatenate(found, axis=1)


rolled = jax.jit(functools.partial(roll, config=CAUSAL))


def test_rollout_is_play_with_an_exit_step():
    given = clips(texts=6)
    for chunks, exit_step in ((5, 1), (6, 0)):
        found = rolled(network(), given, KEY, attend=Attend(), chunks=chunks, exit_step=exit_step)
        wanted = chunk_by_chunk(given, chunks, exit_step)
        np.testing.assert_allclose(found.latents[:, : 2 * chunks], wanted, rtol=1e-4, atol=1e-4)
        assert (found.latents[:, 2 * chunks :] == 0).all() and int(found.cache.count) == 2 * chunks
    play = jax.jit(causal.generate_chunk, static_argnames="config")
    noise = causal.draw_noise(KEY, 0, (2, 2, H, W, TINY.latent_channels), 2)
    cache = causal.KVCache.empty(TINY, causal.cache_layout(CAUSAL, TINY, H, W), 2)
    latents, _ = play(network(), cache, condition_of(TINY, given, jnp.arange(2), 2), noise, CAUSAL)
    np.testing.assert_allclose(latents, chunk_by_chunk(given, 1, 1), rtol=1e-5, atol=1e-6)


def gradient_of(carry, chunks: int, last: int, config: CausalConfig, attend: Attend, given: Encoded) -> tuple:
    """Latents of the last chunks, and the student's gradient of their product with fixed numbers, as one vector."""

    @jax.jit
    def run(model, chunks):
        def product(model):
            made, rollout = carry(model, given, KEY, config, attend, chunks, jnp.int32(1), last)
            return (made * weight).sum(), (made, rollout)

        weight = jax.random.normal(jax.random.key(9), (2, 2 * last, H, W, TINY.latent_channels))
        (_, (made, rollout)), found = jax.value_and_grad(product, has_aux=True)(model)
        return made, rollout.latents, params.arrays_of(found)

    return run(network(), jnp.int32(chunks))


def relative(found: dict, wanted: dict) -> float:
    """Largest difference over the largest value, over all parameters."""
    return max(
        float(np.abs(found[path] - leaf).max() / max(np.abs(leaf).max(), 1e-6))
        for path, leaf in wanted.items()
    )


def test_gradient_goes_through_the_exit_pass_of_the_last_chunks_alone():
    """Against one pass of the network over constants: noisy chunk and cache."""
    given = clips()
    made, latents, found = gradient_of(through_cache, 5, 1, CAUSAL, Attend(), given)
    before, after = (rolled(network(), given, KEY, attend=Attend(), chunks=n, exit_step=1) for n in (4, 5))
    np.testing.assert_allclose(latents[:, 8:10], made, rtol=1e-5)
    weight = jax.random.normal(jax.random.key(9), made.shape)
    few, noisy = CAUSAL.few_steps(), after.noisy[:, 8:10]

    @jax.jit
    @jax.grad
    def by_hand(model: WorldDiT):
        attend = causal.attend_cached(model, before.cache, Attend())
        told = condition_of(TINY, given, jnp.arange(8, 10), 2)
        level = jnp.full((2, 2), few.timesteps[1])
        velocity = model(noisy, level, told, attend=attend, positions=before.cache.positions(2))
        return ((noisy - few.sigmas[1] * velocity) * weight).sum()

    assert relative(found, params.arrays_of(by_hand(network()))) < 1e-4
    # The chunks before the last K are constants: with K = 2 there is more.
    assert relative(gradient_of(through_cache, 5, 2, CAUSAL, Attend(), given)[2], found) > 1e-2


@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_replay_is_the_rollout_and_its_gradient_but_for_what_learns_in_the_context(positions):
    """All 3 chunks lie in the window of 6 frames: what the pass sees is what was cached."""
    given, config = clips(texts=6), dataclasses.replace(CAUSAL, positions=positions)
    cached = gradient_of(through_cache, 3, 2, config, Attend(), given)
    replay = gradient_of(through_replay, 3, 2, config, Attend(), given)
    np.testing.assert_allclose(replay[0], cached[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(replay[1], cached[1], rtol=1e-4, atol=1e-5)
    assert relative(replay[2], cached[2]) > 1e-2, "clean keys and values learn"

    def constant_past(q, k, v, mask, context=None):
        if context is not None:
            return Attend().kernel(q, k, v, mask, context)
        half = q.shape[1] // 2
        stop = lambda x: jnp.concatenate([jax.lax.stop_gradient(x[:, :half]), x[:, half:]], axis=1)
        return Attend().kernel(q, stop(k), stop(v), mask)

    attend = Attend(kernel=constant_past)
    if positions == "relative":  # once is enough
        assert relative(gradient_of(through_replay, 3, 2, config, attend, given)[2], cached[2]) < 2e-3


def test_replay_has_the_sink_and_the_end_of_the_rollout():
    config = dataclasses.replace(CAUSAL, window=6, sink=2)
    frames = lambda chunks: replayed(config, 20, jnp.int32(chunks), last=1).tolist()
    assert frames(10) == [0, 1, 14, 15, 16, 17, 18, 19], "window of the last chunk: 0 1 | 16 17 | 18 19"
    assert frames(2) == list(range(8)), "what is behind the rollout is seen by nobody in it"
    assert replayed(config, 3, jnp.int32(3), last=2).tolist() == list(range(6))


@pytest.mark.parametrize("reference", ["first", "previous"])
@pytest.mark.parametrize("translation", ["max_norm", "metric"])
def test_camera_of_a_window_is_that_of_a_clip_that_begins_there(reference, translation):
    rng = np.random.default_rng(5)
    c2w = np.tile(np.eye(4), (7, 1, 1))
    c2w[:, :3, :3] = np.linalg.qr(rng.normal(size=(7, 3, 3)))[0]
    c2w[:, :3, 3] = rng.normal(size=(7, 3))
    unit = {"max_norm": "max_norm", "metric": None}[translation]
    of = lambda path: np.float32(poses.relative(path.copy(), reference, unit))[None]
    whole = Camera(of(c2w), np.ones((1, 1, 4), np.float32), np.ones((1, 7, 4), np.float32))
    found = camera_window(PoseConfig(reference=reference, translation=translation), whole, jnp.int32(2), 4)
    np.testing.assert_allclose(found.poses, of(c2w[2:6]), rtol=1e-5, atol=1e-6)
    assert found.actions[0].sum() == 12 and (found.actions[0, 0] == 0).all()
    start = camera_window(PoseConfig(reference=reference, translation="metric"), whole, 0, 7)
    np.testing.assert_allclose(start.poses, whole.poses, rtol=1e-6, atol=1e-6)


def distill_config(folder: pathlib.Path, run: str, **fields):
    world = micro.world_config(sample=None, causal=micro.CAUSAL)
    head = DiscriminatorConfig(depths=(0, 1), width=16, heads=2)
    scores = ScoreConfig(shift=3.0, guidance=2.0)
    small = {
        "stage": "distill",
        "world": world,
        "teachers": micro.world_config("high", "low").networks,
        "curriculum": (),
        "steps": 4,
        "tasks": TaskConfig(continuation=0.0),
        "distill": DistillConfig(
            critic_steps=2, shortest=3, window=3, gradient_chunks=2, head=head, scores=scores
        ),
        "checkpoint": micro.CheckpointConfig(every=2, keep=4),
    }
    return micro.config(folder, run, **small | fields)


@pytest.mark.parametrize("condition", ["frame", "latent"])
def test_a_window_begins_with_an_image(condition):
    config = distill_config(micro.ROOT, "unused", init="unused")
    own = CausalConfig(chunk=2, window=6, sink=2)
    world = dataclasses.replace(config.world, causal=own)
    distill = dataclasses.replace(config.distill, condition=condition)
    config = dataclasses.replace(config, world=world, distill=distill)
    given, made = clips(), clips(1).latents
    view = jax.jit(lambda n, codec: score_window(config, TINY, codec, made, given, n))
    start, moved = view(jnp.int32(3), codec()), view(jnp.int32(5), codec())
    np.testing.assert_array_equal(start.latents, made[:, :6])
    np.testing.assert_array_equal(start.condition.image, given.conditioning.image[:, :6])
    assert (start.mask == 1).all()
    np.testing.assert_array_equal(moved.latents[:, 1:], made[:, 5:10])
    image = made[:, 4]
    if condition == "frame":
        pixels = codec().decode(made)[:, 16:17]  # the last of the 4 frames of latent frame 4
        image = codec().encode(pixels)[:, 0]
    np.testing.assert_allclose(moved.latents[:, 0], image, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moved.condition.image[:, 0], image, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(moved.condition.mask, given.conditioning.mask[:, :6])
    assert moved.mask.tolist() == [[0, 1, 1, 1, 1, 1]] * 2


def test_turns_of_critic_student_and_experts():
    config = distill_config(micro.ROOT, "unused", init="unused", steps=400)
    objective = objective_of(config)
    steps = [objective.updates(step) for step in range(400)]
    critics = [updates[0].networks for updates in steps]
    share = sum(c == ("fake_high", "head") for c in critics) / 400
    # The levels above the boundary 0.7, of u uniform and shifted by 3: u > 0.7 / (3 - 2 * 0.7).
    assert set(critics) == {("fake_high", "head"), ("fake_low", "head")}
    np.testing.assert_allclose(share, 1 - 0.7 / 1.6, atol=0.01)
    students = [updates[1] for updates in steps if len(updates) == 2]
    assert len(students) == 200 and all(len(steps[i]) == 1 + (i % 2 == 0) for i in range(400))
    reads = {u.reads for u in students}
    assert reads == {("real_high", "fake_high", "head"), ("real_low", "fake_low", "head")}
    assert objective.update_count("world") == 200 and objective.update_count("head") == 400
    assert objective.update_count("fake_high") + objective.update_count("fake_low") == 400
    assert not objective.trains("real_high", "blocks.ffn.up.kernel")


def test_the_head_teaches_the_student_and_never_the_fake_score():
    """Two heads, one of them mirrored: what does not depend on the head is equal bit for bit."""
    config = distill_config(micro.ROOT, "unused", init="unused")
    own = CausalConfig(chunk=2, window=6, sink=2, schedule="warped", levels=(1000, 500), shift=3.0)
    distill = dataclasses.replace(config.distill, gradient_chunks=1, scores=ScoreConfig(guidance=1.0))
    config = dataclasses.replace(config, world=dataclasses.replace(config.world, causal=own), distill=distill)
    networks = {name: network(TINY, seed) for seed, name in enumerate(("world", "real_low", "fake_low"))}
    template = params.abstract(lambda key: Discriminator(distill.head, TINY, key))
    rng, shapes = np.random.default_rng(0), params.arrays_of(template)
    arrays = {path: jnp.float32(rng.normal(size=leaf.shape)) for path, leaf in shapes.items()}
    heads = [
        params.with_arrays(template, arrays | {"classify.kernel": s * arrays["classify.kernel"]})
        for s in (1, -1)
    ]
    constants = Constants(jnp.zeros((1, TINY.text_len, TINY.text_dim)), codec())

    def gradients(loss, *names: str) -> list[dict]:
        @jax.jit
        @jax.grad
        def run(trained, head):
            given = networks | {"head": head} | trained
            return loss(config, "low", given, clips(), constants, KEY, Attend())[0]

        both = [run({name: networks[name] for name in names}, head) for head in heads]
        return [{name: params.arrays_of(tree) for name, tree in found.items()} for found in both]

    one, other = gradients(critic_loss, "world", "fake_low")
    jax.tree.map(np.testing.assert_array_equal, one["fake_low"], other["fake_low"])
    assert any(np.abs(leaf).max() > 0 for leaf in one["fake_low"].values())
    assert all((leaf == 0).all() for leaf in one["world"].values()), "the critic's samples are constants"
    one, other = gradients(student_loss, "world")
    assert relative(one["world"], other["world"]) > 1e-3


def stored(config, step: int) -> dict[str, np.ndarray]:
    folder = pathlib.Path(config.run) / "checkpoints" / str(step)
    specs = storage.Reader(folder).specs
    return {name: np.asarray(a) for name, a in storage.read(folder, specs, partial=True).items()}


def test_a_run_resumes_bit_for_bit_and_its_student_plays(folder, whole):
    config = distill_config(folder, "distilled", teacher=whole.run, init=f"world={whole.run}#high", steps=2)
    # Unshifted, the first two levels are the low-noise expert's: one program, of critic and student.
    scores = ScoreConfig(shift=1.0, guidance=1.0)
    distill = dataclasses.replace(config.distill, critic_steps=1, gradient_chunks=1, scores=scores)
    config = dataclasses.replace(config, distill=distill, checkpoint=micro.CheckpointConfig(every=1))
    micro.train(config)
    again = dataclasses.replace(config, run=str(folder / "distilled again"))
    shutil.copytree(config.run, again.run)
    shutil.rmtree(pathlib.Path(again.run) / "checkpoints" / "2")
    micro.train(again)
    assert micro.losses_of(config) == micro.losses_of(again) and sorted(micro.losses_of(config)) == [1, 2]
    ours, theirs = stored(config, 2), stored(again, 2)
    roles = {name.split(".")[1] for name in ours if name.startswith("params.")}
    assert roles == {"world", "real_high", "real_low", "fake_high", "fake_low", "head"}
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    assert not any(name.startswith("opt.real") for name in ours)
    assert {name.split(".")[1] for name in ours if name.startswith("ema.")} == {"world"}

    world = micro.opened(config)
    assert list(world.networks) == ["world"]
    session = world.session()
    session.start(np.zeros((16, 32, 3), np.uint8), "A gradient.", seed=1)
    assert session.step(np.eye(8)[0]).shape == (1, 16, 32, 3)


def test_what_does_not_fit_is_refused_in_one_line(folder, whole):
    make = functools.partial(distill_config, folder, "refused", init=f"world={whole.run}#high")
    with pytest.raises(ConfigError, match="^teacher = None: "):
        make(teachers={})
    with pytest.raises(ConfigError, match="^tasks.continuation = 0.3: "):
        make(teacher=whole.run, tasks=TaskConfig(max_conditioning_frames=2))
    with pytest.raises(ConfigError, match="^gradient_chunks = 3: must be at most window = 2"):
        DistillConfig(gradient_chunks=3, window=2)
    config = make(teacher=whole.run)
    long = dataclasses.replace(config.distill, shortest=5)
    with pytest.raises(ConfigError, match="^config.distill.shortest = 5: must be at most the 4 chunks of"):
        micro.train(dataclasses.replace(config, distill=long))
    with pytest.raises(ConfigError, match=r"^config.world.boundary = 0.5: the teacher, \S+, has 0.7"):
        micro.train(
            dataclasses.replace(config, teachers={}, world=dataclasses.replace(config.world, boundary=0.5))
        )


def test_length_and_exit_are_drawn_per_step_and_known_beforehand_in_a_plan():
    config = distill_config(micro.ROOT, "unused", init="unused")
    keys = jax.random.split(KEY, 100)
    chunks, exits = jax.vmap(lambda key: jnp.stack(draw_rollout(key, config, 6)))(keys).T
    assert set(chunks.tolist()) == {3, 4, 5, 6} and set(exits.tolist()) == {0, 1}
    frames = config.world.codec.latent_frames(config.data.frames)
    assert draw_rollout(KEY, longest_rollouts(config, 0), frames) == (frames, 1)


def test_every_update_of_a_step_is_guarded():
    report = Report(distill_config(micro.ROOT, "unused", init="unused"), None, None, Goodput())
    fine, bad = (Mean(jnp.float32(value), jnp.float32(1)) for value in (1.0, np.nan))
    report.later(7, {"loss": fine, "grad_norm": fine, "grad_norm_world": bad}, np.array(["a clip"]), None)
    with pytest.raises(NonFiniteLoss, match="^grad_norm_world = nan at step 7; "):
        report.now()


def test_peak_memory_of_the_student_s_step_does_not_grow_with_the_rollout():
    """A short form of `python -m tests.bench distill_memory`; one more chunk with a gradient is seen."""
    devices = jax.devices()[:1]
    short, long = (distill_memory.peak_bytes(distill_memory.config(chunks), devices) for chunks in (7, 28))
    assert short <= long < 1.01 * short
    assert distill_memory.peak_bytes(distill_memory.config(7, last=4), devices) > 1.005 * short
