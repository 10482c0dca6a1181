"""A batch of clips generated chunk after chunk from the model's own past, inside one program (paper section 3.4.2).

Memory does not grow with the number of chunks, but for the latents themselves: the cache is a ring, the loop over
chunks keeps nothing of them but what they became, and of the chunks that carry a gradient there are as many as asked.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lingbot_jax.models.attention import Attend
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.dit import Condition, WorldDiT
from lingbot_jax.rollout import causal
from lingbot_jax.rollout.cache import KVCache
from lingbot_jax.worlds.clips import Encoded
from lingbot_jax.worlds.condition import Camera, make_condition
from lingbot_jax.worlds.config import CausalConfig

Latents = Float[Array, "b t h w c"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """Attributes:
    latents: clean, of all frames of the clips; zero behind the last chunk that was generated.
    noisy: what they were predicted from.
    cache: behind the last chunk.
    """

    latents: Latents
    noisy: Latents
    cache: KVCache


def condition_of(network: DiTConfig, clips: Encoded, frames: Int[Array, "n"], chunk: int) -> Condition:
    """What a network is told of given latent frames of clips: whole chunks, one after the other."""
    camera = Camera(clips.camera.poses[:, frames], clips.camera.intrinsics, clips.camera.actions[:, frames])
    text = text_of(clips.text, frames[::chunk] // chunk)
    size = clips.conditioning.image.shape[2:4]
    return make_condition(network, size, text, camera, clips.conditioning.at(frames))


def text_of(text: Float[Array, "b *n l d"], chunks: Int[Array, "m"]) -> Float[Array, "b *m l d"]:
    """The text of chunks, where a clip has one for each."""
    if text.ndim == 3:
        return text
    return text[:, chunks[0]] if len(chunks) == 1 else text[:, chunks]


def start(model: WorldDiT, clips: Encoded, config: CausalConfig) -> Rollout:
    """Before the first chunk. `clips.latents` are not looked at."""
    batch, frames = clips.camera.poses.shape[:2]
    height, width, channels = clips.conditioning.image.shape[2:]
    layout = causal.cache_layout(config, model.config, height, width, frames)
    empty = jnp.zeros((batch, frames, height, width, channels))
    return Rollout(empty, empty, KVCache.empty(model.config, layout, batch))


def next_chunk(
    model: WorldDiT,
    rollout: Rollout,
    clips: Encoded,
    key: PRNGKeyArray,
    config: CausalConfig,
    attend: Attend,
    exit_step: causal.Number | None = None,
) -> tuple[Latents, Rollout]:
    """One chunk more: its latents, through which the gradient goes, and the rollout with it, which carries none."""
    first, t = rollout.cache.count, config.chunk
    condition = condition_of(model.config, clips, first + jnp.arange(t, dtype=jnp.int32), t)
    shape = (rollout.latents.shape[0], t, *rollout.latents.shape[2:])
    noise = causal.draw_noise(key, first // t, shape, config.draws)
    made = causal.denoise_chunk(model, rollout.cache, condition, noise, config, attend, exit_step)
    put = lambda all, part: jax.lax.dynamic_update_slice_in_dim(all, part, first, axis=1)
    latents, noisy, kv = jax.lax.stop_gradient((made.latents, made.noisy, made.kv))
    cache = rollout.cache.write(kv, model.config)
    return made.latents, Rollout(put(rollout.latents, latents), put(rollout.noisy, noisy), cache)


def roll(
    model: WorldDiT,
    clips: Encoded,
    key: PRNGKeyArray,
    config: CausalConfig,
    attend: Attend,
    chunks: causal.Number,
    exit_step: causal.Number | None = None,
) -> Rollout:
    """The first `chunks` chunks of clips, from the images and along the paths that they have. No gradient.

    Args:
      chunks: at most those of the clips. exit_step: of every chunk; None: as in play.
    """
    model = jax.lax.stop_gradient(model)

    def body(_: Array, rollout: Rollout) -> Rollout:
        return next_chunk(model, rollout, clips, key, config, attend, exit_step)[1]

    return jax.lax.fori_loop(0, chunks, body, start(model, clips, config))


def roll_on(
    model: WorldDiT,
    rollout: Rollout,
    clips: Encoded,
    key: PRNGKeyArray,
    config: CausalConfig,
    attend: Attend,
    chunks: int,
    exit_step: causal.Number | None = None,
) -> tuple[Latents, Rollout]:
    """The next `chunks` chunks, whose latents `b chunks*t h w c` carry a gradient: each through its exit pass."""

    def body(rollout: Rollout, _: None) -> tuple[Rollout, Latents]:
        latents, rollout = next_chunk(model, rollout, clips, key, config, attend, exit_step)
        return rollout, latents

    rollout, made = jax.lax.scan(body, rollout, None, length=chunks)
    return jnp.concatenate(list(made), axis=1) if chunks > 1 else made[0], rollout
