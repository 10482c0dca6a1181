"""The device part of a running world: a value that a chunk maps to the next one.

`advance`, `rebuild_cache` and `decode` are the three programs of a session. Each is compiled once for any length
of play; what they change is donated.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from kernels_pallas.context import valid_slots
from lingbot_jax.axes import Placeholder
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.codec import Codec, Stream, to_uint8
from lingbot_jax.models.dit import Condition, WorldDiT
from lingbot_jax.parallel.sharding import constrain_columns
from lingbot_jax.rollout import causal
from lingbot_jax.rollout.cache import CacheLayout, KVCache
from lingbot_jax.worlds.condition import Camera, Conditioning, make_condition
from lingbot_jax.worlds.config import CausalConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceState:
    """Its structure never changes.

    Attributes:
      cache: keys and values of the window.
      latents: `1 slots h w c`, clean latents of the cached frames; poses `slots 4 4` and actions `slots 4` belong to
        them: all that is needed to write the cache again.
      conditioning: of the first latent frames; later ones are as the last of them.
      intrinsics: `1 1 4`, pixels of the video.
    """

    cache: KVCache
    latents: Float[Array, "1 slots h w c"] | Placeholder
    poses: Float[Array, "slots 4 4"] | Placeholder
    actions: Float[Array, "slots 4"] | Placeholder
    conditioning: Conditioning
    intrinsics: Float[Array, "1 1 4"] | Placeholder

    @classmethod
    def start(
        cls,
        model: WorldDiT,
        config: CausalConfig,
        conditioning: Conditioning,
        intrinsics: Float[Array, "1 1 4"],
    ) -> "DeviceState":
        """Before the first chunk."""
        height, width, channels = conditioning.image.shape[2:]
        layout = causal.cache_layout(config, model.config, height, width)
        return cls(
            cache=KVCache.empty(model.config, layout, 2 if config.guided else 1),
            latents=jnp.zeros((1, layout.slots, height, width, channels)),
            poses=jnp.zeros((layout.slots, 4, 4)),
            actions=jnp.zeros((layout.slots, 4)),
            conditioning=conditioning,
            intrinsics=intrinsics,
        )

    def condition(
        self,
        model: WorldDiT,
        text: Float[Array, "b l d"],
        frames: Int[Array, "t"],
        poses: Float[Array, "t 4 4"],
        actions: Float[Array, "t 4"],
    ) -> Condition:
        """The condition of given latent frames, per row of text: all else is the same."""
        rows = len(text)
        each = lambda x: jnp.repeat(x, rows, axis=0)
        camera = Camera(each(poses[None]), each(self.intrinsics), each(actions[None]))
        size, known = self.conditioning.image.shape[2:4], self.conditioning.at(frames)
        known = jax.tree.map(each, known)
        return make_condition(model.config, size, text, camera, known)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def advance(
    model: WorldDiT,
    state: DeviceState,
    text: Float[Array, "b l d"],
    poses: Float[Array, "t 4 4"],
    actions: Float[Array, "t 4"],
    key: PRNGKeyArray,
    attend: Attend,
    config: CausalConfig,
) -> tuple[Float[Array, "1 t h w c"], DeviceState]:
    """Generates the next chunk: its clean latents, and the state after it.

    Args:
      text: one row; with guidance a second one, of the unconditional branch.
    """
    cache = state.cache
    frames = cache.count + jnp.arange(config.chunk, dtype=jnp.int32)
    condition = state.condition(model, text, frames, poses, actions)
    shape = (1, config.chunk, *state.latents.shape[2:])
    noise = causal.draw_noise(key, cache.count // config.chunk, shape, config.draws)
    latents, cache = causal.generate_chunk(model, cache, condition, noise, config, attend)
    past = (state.latents, state.poses, state.actions)
    for i in range(config.chunk if cache.layout.slots else 0):
        at = cache.layout.slot(frames[i])
        # As in the cache: without a ring, what is past the sink is not kept (the index is dropped).
        past = (
            past[0].at[:, at].set(latents[:, i], mode="drop"),
            past[1].at[at].set(poses[i], mode="drop"),
            past[2].at[at].set(actions[i], mode="drop"),
        )
    return latents, dataclasses.replace(state, cache=cache, latents=past[0], poses=past[1], actions=past[2])


def _frame_at(layout: CacheLayout, count: Int[Array, ""], place: Int[Array, ""]) -> Int[Array, ""]:
    """The frame at a place of the window: the sink, then the ring from its oldest frame."""
    oldest = jnp.maximum(count, layout.slots) - layout.ring
    return jnp.where(place < layout.sink, place, oldest + place - layout.sink)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def rebuild_cache(
    model: WorldDiT, state: DeviceState, text: Float[Array, "b l d"], attend: Attend, config: CausalConfig
) -> DeviceState:
    """Writes the cached window again under another text: a cache-update pass per chunk, oldest first."""
    layout, t, count = state.cache.layout, config.chunk, state.cache.count

    def body(cache: KVCache, group: Int[Array, ""]) -> tuple[KVCache, None]:
        place = group * t
        frames = _frame_at(layout, count, place) + jnp.arange(t, dtype=jnp.int32)
        at = layout.slot(frames[0])
        cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, at, t, axis)
        condition = state.condition(model, text, frames, cut(state.poses, 0), cut(state.actions, 0))
        # Seen: the sink and the ring as far as they are written again, in slots (the ring wraps around).
        first = (jnp.maximum(count, layout.slots) - layout.slots) % max(layout.ring, 1)
        done = jnp.maximum(place - layout.sink, 0)
        end = layout.sink + first + done
        seen = valid_slots(
            (0, jnp.minimum(place, layout.sink)),
            (layout.sink + first, jnp.minimum(end, layout.slots)),
            (layout.sink, jnp.maximum(end - layout.ring, layout.sink)),
        )
        position = frames if layout.positions == "absolute" else place + jnp.arange(t, dtype=jnp.int32)
        _, kv = model(
            jnp.repeat(cut(state.latents, 1), len(text), axis=0),
            jnp.full((len(text), t), config.context_noise),
            condition,
            attend=dataclasses.replace(attend, context=cache.context(model.config, seen)),
            positions=position,
            return_kv=True,
        )
        return cache.store(kv, frames, model.config, limit=count), None

    cache, _ = jax.lax.scan(body, state.cache, jnp.arange(layout.slots // t, dtype=jnp.int32))
    return dataclasses.replace(state, cache=cache)


@functools.partial(jax.jit, static_argnames=("first",), donate_argnames=("stream",))
def decode(
    codec: Codec, latents: Float[Array, "1 t h w c"], stream: Stream, first: bool
) -> tuple[UInt8[Array, "f H W 3"], Stream]:
    """The video frames of the next latent frames; on a mesh every device makes some of their columns."""
    latents, stream = jax.tree.map(constrain_columns, (latents, stream))
    video, stream = codec.decode_chunk(latents, stream, first=first)
    return to_uint8(video[0]), jax.tree.map(constrain_columns, stream)
