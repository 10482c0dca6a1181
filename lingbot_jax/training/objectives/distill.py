"""Stage `distill`: the student rolls out on its own past and learns from a frozen teacher (paper section 3.4.2).

Two updates with optimisers of their own. At every step the critic: the fake score by flow matching on what the student
generates, and the head, if there is one, on the fake score's features of generated and of recorded videos. At every
`critic_steps`-th step then the student: distribution matching, and the head's verdict.

A rollout has a length and an exit step that are drawn once, from the step's key: the same for all samples and on all
hosts. Scores see its last `window` chunks as a clip of its own (`score_window`). Of two experts a step compares the
scores of one, at noise levels of that expert's region, as many steps as there are levels in it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lingbot_jax.diffusion import distill
from lingbot_jax.diffusion.flow import TIMESTEPS, add_noise, over, x0_from_velocity
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.codec import Codec
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.dit import Condition, WorldDiT
from lingbot_jax.models.lora import trains
from lingbot_jax.rollout.causal import Number
from lingbot_jax.rollout.self_rollout import Rollout, condition_of, roll, roll_on, text_of
from lingbot_jax.training import curriculum
from lingbot_jax.training.config import STUDENT, TrainConfig
from lingbot_jax.training.networks import FAKE, HEAD, REAL, score_name
from lingbot_jax.training.objectives import Constants, Mean, Metrics, Networks, Update
from lingbot_jax.training.objectives.causal import block_causal_velocity
from lingbot_jax.worlds.clips import Encoded
from lingbot_jax.worlds.condition import Conditioning, camera_window, make_condition
from lingbot_jax.worlds.config import CausalConfig

Latents = Float[Array, "b t h w c"]


@dataclasses.dataclass(frozen=True)
class DistillObjective:
    """The student (or its low-rank adapters), the fake scores and the head train. `config` is that of all phases."""

    config: TrainConfig

    def trains(self, network: str, path: str) -> bool:
        if network == STUDENT:
            return trains(self.config.lora, path)
        return not network.startswith(REAL)

    def updates(self, step: int) -> tuple[Update, ...]:
        phase = self.config.phases()[curriculum.phase_at(self.config, step)]
        every, head = self.config.distill.critic_steps, self._head()
        expert = self._expert(step)
        critics = (score_name(FAKE, expert), *head)
        updates = (Update(critics, functools.partial(critic_loss, phase, expert), (STUDENT,)),)
        if step % every == 0:
            expert = self._expert(step // every)
            reads = (score_name(REAL, expert), score_name(FAKE, expert), *head)
            updates += (Update((STUDENT,), functools.partial(student_loss, phase, expert), reads),)
        return updates

    def update_count(self, network: str) -> int:
        steps = self.config.optimizer.decay_steps or self.config.steps
        if network == STUDENT:
            return -(-steps // self.config.distill.critic_steps)
        high = math.floor(steps * self._share())
        return max({"fake_high": high, "fake_low": steps - high}.get(network, steps), 1)

    def _head(self) -> tuple[str, ...]:
        return () if self.config.distill.head is None else (HEAD,)

    def _share(self) -> float:
        """The part of the scores' noise levels that belongs to the high-noise expert."""
        return distill.share_above(self.config.distill.scores, self.config.world.boundary)

    def _expert(self, i: int) -> str:
        """The teacher's network of the i-th update, in even turns."""
        if len(self.config.teachers) == 1:
            return next(iter(self.config.teachers))
        share = self._share()
        return "high" if math.floor((i + 1) * share) > math.floor(i * share) else "low"


def draw_rollout(key: PRNGKeyArray, config: TrainConfig, frames: int) -> tuple[Number, Number]:
    """Chunks and exit step of a rollout, numbers where they are not drawn. `frames`: latent frames of the clips."""
    length_key, exit_key = jax.random.split(key)
    shortest, longest = config.distill.shortest, frames // config.world.causal.chunk
    steps = len(config.world.causal.levels)
    chunks, exit_step = longest, steps - 1
    if shortest < longest:
        chunks = jax.random.randint(length_key, (), shortest, longest + 1)
    if config.distill.exit_step == "drawn":
        exit_step = jax.random.randint(exit_key, (), 0, steps)
    return chunks, exit_step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """The end of videos as a clip of its own.

    Attributes:
      latents: what the scores see. condition: what they are told. mask: 1 where the student's gradient may enter.
    """

    latents: Latents
    condition: Condition
    mask: Float[Array, "b t"]


def score_window(
    config: TrainConfig, network: DiTConfig, codec: Codec, latents: Latents, clips: Encoded, chunks: Number
) -> Window:
    """The last `distill.window` of `chunks` chunks.

    A window that does not begin where the clip does begins with an image that the teacher is given, as it is given the
    clip's: the first latent frame's last video frame, encoded again (or that latent frame, `distill.condition`). It
    takes the frame's place among the latents, and no gradient goes through it.

    Args:
      network: of the scores. latents: of the clips' frames, generated or recorded.
    """
    chunk, count = config.world.causal.chunk, config.distill.window * config.world.causal.chunk
    first = (chunks - config.distill.window) * chunk
    moved = first > 0
    seen = jax.lax.dynamic_slice_in_dim(latents, first, count, axis=1)
    image = jax.lax.stop_gradient(seen[:, 0])
    if config.distill.condition == "frame":
        past = jax.lax.dynamic_slice_in_dim(
            jax.lax.stop_gradient(latents), jnp.maximum(first - 1, 0), 2, axis=1
        )
        image = codec.encode(codec.decode(past)[:, -1:])[:, 0]
    given = clips.conditioning
    told = Conditioning(
        given.mask[:, :count],
        given.image[:, :count].at[:, 0].set(jnp.where(moved, image, given.image[:, 0])),
    )
    text = text_of(clips.text, chunks - config.distill.window + jnp.arange(config.distill.window))
    camera = camera_window(config.world.pose, clips.camera, first, count)
    return Window(
        latents=seen.at[:, 0].set(jnp.where(moved, image, seen[:, 0])),
        condition=make_condition(network, latents.shape[2:4], text, camera, told),
        mask=jnp.ones(seen.shape[:2]).at[:, 0].set(jnp.where(moved, 0.0, 1.0)),
    )


def critic_loss(
    config: TrainConfig,
    expert: str,
    networks: Networks,
    clips: Encoded,
    constants: Constants,
    key: PRNGKeyArray,
    attend: Attend,
) -> tuple[Float[Array, ""], Metrics]:
    """Flow matching of the fake score on the student's samples, and the head's loss (Eq. 6), which reaches it alone."""
    student, fake = networks[STUDENT], networks[score_name(FAKE, expert)]
    draw_key, roll_key, level_key, noise_key = jax.random.split(key, 4)
    chunks, exit_step = draw_rollout(draw_key, config, clips.latents.shape[1])
    made = roll(student, clips, roll_key, config.world.causal, attend, chunks, exit_step)
    view = lambda latents: score_window(config, fake.config, constants.codec, latents, clips, chunks)
    window = view(made.latents)
    sigma = _levels(level_key, config, expert, window.latents)
    noise = jax.random.normal(noise_key, window.latents.shape)
    head, depths = networks.get(HEAD), config.distill.head.depths if config.distill.head else ()

    def look(network: WorldDiT, window: Window):
        timestep = jnp.broadcast_to(TIMESTEPS * sigma, window.latents.shape[:2])
        noisy = add_noise(window.latents, noise, sigma)
        return network(noisy, timestep, window.condition, attend=attend, depths=depths)

    if head is None:
        loss = distill.critic_loss(look(fake, window), window.latents, noise)
        return loss, _means(loss=loss, chunks=chunks)
    velocity, generated = look(fake, window)
    _, recorded = look(jax.lax.stop_gradient(fake), view(clips.latents))
    flow = distill.critic_loss(velocity, window.latents, noise)
    verdict, told = distill.discriminator_loss(head, recorded, generated)
    return flow + verdict, _means(loss=flow, head_loss=verdict, chunks=chunks, **told)


def student_loss(
    config: TrainConfig,
    expert: str,
    networks: Networks,
    clips: Encoded,
    constants: Constants,
    key: PRNGKeyArray,
    attend: Attend,
) -> tuple[Float[Array, ""], Metrics]:
    """Eq. 4 on the end of a rollout, and with a head Eq. 5, through the rollout's last `gradient_chunks` chunks."""
    student = networks[STUDENT]
    real, fake = (networks[score_name(role, expert)] for role in (REAL, FAKE))
    draw_key, roll_key, level_key, noise_key = jax.random.split(key, 4)
    chunks, exit_step = draw_rollout(draw_key, config, clips.latents.shape[1])
    carry = {"cache": through_cache, "replay": through_replay}[config.distill.gradient]
    last = config.distill.gradient_chunks
    made, rollout = carry(student, clips, roll_key, config.world.causal, attend, chunks, exit_step, last)

    window = score_window(config, real.config, constants.codec, rollout.latents, clips, chunks)
    fixed = window.latents.shape[1] - made.shape[1]
    x = window.latents.at[:, fixed:].set(made)
    mask = window.mask.at[:, :fixed].set(0.0)
    x = jnp.where(over(mask, x) > 0, x, window.latents)  # its first frame may be an image
    sigma = _levels(level_key, config, expert, x)
    noise = jax.random.normal(noise_key, x.shape)

    told = window.condition
    null = dataclasses.replace(told, text=jnp.broadcast_to(constants.null_text, told.text.shape))
    scores = config.distill.scores
    conditions = (told,) if scores.guidance == 1.0 else (told, null)

    def real_x0(noisy: Latents, sigma: Array) -> Latents:
        network = lambda x, timestep, condition: real(x, timestep, condition, attend=attend)
        return distill.predict_real(network, noisy, sigma, conditions, scores)

    # One pass of the fake score gives its prediction and, with the gradient left in, what the head looks at.
    head, depths = networks.get(HEAD), config.distill.head.depths if config.distill.head else ()
    timestep = jnp.broadcast_to(TIMESTEPS * sigma, x.shape[:2])
    seen = fake(
        add_noise(x if head else jax.lax.stop_gradient(x), noise, sigma),
        timestep,
        told,
        attend=attend,
        depths=depths,
    )
    velocity, features = seen if head else (seen, None)
    fake_x0 = lambda noisy, sigma: x0_from_velocity(noisy, velocity, sigma)
    loss, found = distill.dmd_loss(x, noise, sigma, real_x0, fake_x0, mask)
    found |= {"dmd_loss": loss}
    if head is not None:
        found["adversarial"] = distill.adversarial_loss(head(features))
        loss = loss + config.distill.adversarial * found["adversarial"]
    return loss, _means(loss=loss, chunks=chunks, **found)


def _levels(key: PRNGKeyArray, config: TrainConfig, expert: str, latents: Latents) -> Float[Array, "b 1"]:
    return distill.sample_score_level(key, len(latents), config.distill.scores, config.world.region(expert))


def _means(**values: Array) -> Metrics:
    return {name: Mean(jnp.asarray(value, jnp.float32), jnp.float32(1)) for name, value in values.items()}


# --- How the gradient gets from a rollout's last chunks into the student.


def through_cache(
    student: WorldDiT,
    clips: Encoded,
    key: PRNGKeyArray,
    config: CausalConfig,
    attend: Attend,
    chunks: Number,
    exit_step: Number,
    last: int,
) -> tuple[Latents, Rollout]:
    """A rollout, and its last chunks with the gradient of their exit passes; the cache before them is a constant."""
    before = roll(student, clips, key, config, attend, chunks - last, exit_step)
    return roll_on(student, before, clips, key, config, attend, last, exit_step)


def through_replay(
    student: WorldDiT,
    clips: Encoded,
    key: PRNGKeyArray,
    config: CausalConfig,
    attend: Attend,
    chunks: Number,
    exit_step: Number,
    last: int,
) -> tuple[Latents, Rollout]:
    """A rollout without gradient, and its last chunks from one teacher-forced pass over what it made.

    The pass sees the sink and as many chunks at the end as the first of the last ones had in its window. It gives
    what the cache gave, as long as that is all of the rollout; of a longer one, what left the window lives on in the
    cached keys and values of later frames, but not in the pass.
    """
    rollout = roll(student, clips, key, config, attend, chunks, exit_step)
    frames = replayed(config, rollout.latents.shape[1] // config.chunk, chunks, last)
    few, cut = config.few_steps(), lambda x: x[:, frames]
    sigma, timestep = (jnp.asarray(a, jnp.float32)[exit_step] for a in (few.sigmas, few.timesteps))
    noisy = cut(rollout.noisy)
    velocity = block_causal_velocity(
        student,
        noisy,
        jnp.full(noisy.shape[:2], timestep),
        condition_of(student.config, clips, frames, config.chunk),
        config,
        attend,
        past=cut(rollout.latents),
        positions=_positions(rollout, config, frames),
    )
    clean = x0_from_velocity(noisy, velocity, sigma)
    at = jnp.argmax(frames == (chunks - last) * config.chunk)
    return jax.lax.dynamic_slice_in_dim(clean, at, last * config.chunk, axis=1), rollout


def replayed(config: CausalConfig, total: int, chunks: Number, last: int) -> Int[Array, "n"]:
    """Latent frames of a replay: the chunks of the sink, then those at the end of the rollout.

    Args:
      total: chunks that there is room for. chunks: of the rollout; what is behind them is seen by none of them.
    """
    kept = -(-config.sink // config.chunk)
    recent = total
    if config.window is not None:
        recent = -(-(config.window - config.sink) // config.chunk) + last
    kept, recent = (kept, recent) if kept + recent < total else (0, total)
    first = jnp.clip(chunks - recent, kept, total - recent)
    sink, end = jnp.arange(kept * config.chunk), jnp.arange(recent * config.chunk)
    return jnp.concatenate([sink, first * config.chunk + end]).astype(jnp.int32)


def _positions(rollout: Rollout, config: CausalConfig, frames: Int[Array, "n"]) -> Int[Array, "n"]:
    """Rotary positions of latent frames, as the last chunk saw them."""
    if config.positions == "absolute" or config.window is None:
        return frames
    before = rollout.cache.count - config.chunk
    gone = jnp.maximum(before - rollout.cache.layout.slots, 0)
    return jnp.where(frames < config.sink, frames, jnp.maximum(frames - gone, 0))
