"""An interactive session: a world that is walked chunk by chunk, steered by text, and branched.

    session = Session(model, codec, text_encoder, config)
    session.start(image, "a castle by a lake", seed=1)
    frames = session.step(keys)                    # uint8 video frames of the next chunk
    session.say("winter, heavy snow")              # from the next chunk on
    other = session.branch()                       # the same past, another future (paper section 5.1)

Everything that changes is a value, `Play` on the device and `Walk` on the host; a step maps them to new ones.
The device part of a step is one compiled program for any length of play. Randomness depends on (seed, chunk
number) only, so the same seed, keys and events give the same frames, also from a restored snapshot.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, PRNGKeyArray, Shaped, UInt8

from kernels_pallas.context import valid_slots
from lingbot_jax.config import require
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.control import keyboard, plucker, poses
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.codec import Codec, Stream, to_float, to_uint8
from lingbot_jax.models.dit import Condition, WorldDiT
from lingbot_jax.models.text import TextEncoder
from lingbot_jax.rollout import causal
from lingbot_jax.rollout.bidirectional import given_frames
from lingbot_jax.rollout.cache import CacheLayout, KVCache
from lingbot_jax.rollout.causal import CausalConfig


@dataclasses.dataclass(frozen=True)
class SessionConfig:
    """How a world is played.

    Attributes:
      causal: chunks, window and levels.
      walk: world units a video frame of a movement key. turn: degrees a video frame of a looking key.
      fov: horizontal field of view in degrees, where `start` is given no intrinsics.
      reference: control poses relative to the first latent frame or each to the one before, as in training.
      unit: world units that count as 1 in control translations; None: a step of walking a latent frame,
        which is what training's division by the largest translation gives a walker.
      lead: latent frames of conditioning (the image, then grey) encoded at the start; later frames repeat
        the last one.
    """

    causal: CausalConfig = CausalConfig()
    walk: float = keyboard.STEP
    turn: float = keyboard.DEGREES
    fov: float = 90.0
    reference: Literal["first", "previous"] = "previous"
    unit: float | None = None
    lead: int = 21

    def __post_init__(self):
        require(self.causal.window is not None, "causal.window", None, "play has no end and needs a window")
        require(self.walk > 0, "session.walk", self.walk, "must be positive")
        require(self.turn > 0, "session.turn", self.turn, "must be positive")
        require(0 < self.fov < 180, "session.fov", self.fov, "must be between 0 and 180 degrees")
        require(self.unit is None or self.unit > 0, "session.unit", self.unit, "must be positive")
        require(self.lead >= 1, "session.lead", self.lead, "must be at least 1 latent frame")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Play:
    """The device part of a session; its structure never changes.

    Attributes:
      cache: keys and values of the window. latents `1 slots h w c`, relative `slots 4 4`, held `slots 4`: the
        clean latents, control poses and movement keys of the cached frames, to encode them again.
      lead: `1 lead h w c`, conditioning latents. intrinsics: `1 4`, pixels of the video.
    """

    cache: KVCache
    latents: Float[Array, "1 slots h w c"]
    relative: Float[Array, "slots 4 4"]
    held: Float[Array, "slots 4"]
    lead: Float[Array, "1 lead h w c"]
    intrinsics: Float[Array, "1 4"]


@dataclasses.dataclass(frozen=True)
class Walk:
    """The host part of a session.

    Attributes:
      seed: of the noise. chunk: chunks generated. c2w: pose of the last video frame. latent_c2w: of the last
        latent frame. origin: of the first.
      prompt: the lasting prompt. text: its tokens. before, blend, said: the text blends from `before` over
        `blend` chunks since chunk `said`. event, until: tokens of a passing event, up to chunk `until`.
    """

    seed: int
    chunk: int
    c2w: Float64[np.ndarray, "4 4"]
    latent_c2w: Float64[np.ndarray, "4 4"]
    origin: Float64[np.ndarray, "4 4"]
    prompt: str
    text: Float[np.ndarray, "1 l d"]
    before: Float[np.ndarray, "1 l d"]
    blend: int = 0
    said: int = 0
    event: Float[np.ndarray, "1 l d"] | None = None
    until: int = 0

    def tokens(self) -> Float[np.ndarray, "1 l d"]:
        """Text tokens of the next chunk."""
        if self.event is not None and self.chunk < self.until:
            return self.event
        share = 1.0 if self.blend == 0 else min(1.0, (self.chunk - self.said + 1) / (self.blend + 1))
        return (self.before + np.float32(share) * (self.text - self.before)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Everything a session is, at a moment: restore it as often as you like."""

    play: Play
    walk: Walk
    stream: Stream


def _condition(
    config: DiTConfig,
    codec: Codec,
    play: Play,
    text: Float[Array, "1 l d"],
    frames: Int[Array, "t"],
    relative: Float[Array, "t 4 4"],
    held: Float[Array, "t 4"],
) -> Condition:
    """The condition of given latent frames; control is unfolded from poses and keys here, on the device."""
    stride, height, width = codec.config.stride[0], *play.lead.shape[2:4]
    packed = None
    if config.control != "none":
        keys = None if config.control == "cam" else held[None]
        s = config.spatial_stride
        packed = plucker.control(
            relative[None], play.intrinsics[None], keys, config.control, height * s, width * s, s
        )
    mask = image = None
    if config.image_condition:
        image = play.lead[:, jnp.minimum(frames, play.lead.shape[1] - 1)]
        given = (frames == 0).astype(image.dtype)[None, :, None, None, None]
        mask = jnp.broadcast_to(given, (1, len(frames), height, width, stride))
    return Condition(text=text, control=packed, mask=mask, image=image)


@functools.partial(jax.jit, static_argnames=("config", "attend"), donate_argnames=("play",))
def _advance(
    model: WorldDiT,
    codec: Codec,
    play: Play,
    text: Float[Array, "1 l d"],
    relative: Float[Array, "t 4 4"],
    held: Float[Array, "t 4"],
    key: PRNGKeyArray,
    config: CausalConfig,
    attend: Attend,
) -> tuple[Float[Array, "1 t h w c"], Play]:
    """Generates the next chunk: its clean latents, and the play after it."""
    frames = play.cache.count + jnp.arange(config.chunk, dtype=jnp.int32)
    condition = _condition(model.config, codec, play, text, frames, relative, held)
    shape = (1, config.chunk, *play.lead.shape[2:])
    noise = causal.draw_noise(key, play.cache.count // config.chunk, shape, len(config.levels))
    latents, cache = causal.generate_chunk(model, play.cache, condition, noise, config, attend)
    past = (play.latents, play.relative, play.held)
    for i in range(config.chunk if cache.layout.slots else 0):
        at = cache.layout.slot(frames[i])
        new = (latents[:, i], relative[i], held[i])
        # As in the cache: without a ring, what is past the sink is not kept (the index is dropped).
        past = (
            past[0].at[:, at].set(new[0], mode="drop"),
            past[1].at[at].set(new[1], mode="drop"),
            past[2].at[at].set(new[2], mode="drop"),
        )
    return latents, dataclasses.replace(play, cache=cache, latents=past[0], relative=past[1], held=past[2])


def _order(layout: CacheLayout, count: Int[Array, ""], place: Int[Array, ""]) -> Int[Array, ""]:
    """The frame at a place of the window: the sink, then the ring from its oldest frame."""
    oldest = jnp.maximum(count, layout.slots) - layout.ring
    return jnp.where(place < layout.sink, place, oldest + place - layout.sink)


@functools.partial(jax.jit, static_argnames=("config", "attend"), donate_argnames=("play",))
def _reencode(
    model: WorldDiT,
    codec: Codec,
    play: Play,
    text: Float[Array, "1 l d"],
    config: CausalConfig,
    attend: Attend,
) -> Play:
    """Writes the cached window again under another text: a clean pass per chunk, oldest first."""
    layout, t, count = play.cache.layout, config.chunk, play.cache.count

    def body(cache: KVCache, group: Int[Array, ""]) -> tuple[KVCache, None]:
        place = group * t
        frames = _order(layout, count, place) + jnp.arange(t, dtype=jnp.int32)
        at = layout.slot(frames[0])
        cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, at, t, axis)
        condition = _condition(
            model.config, codec, play, text, frames, cut(play.relative, 0), cut(play.held, 0)
        )
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
            cut(play.latents, 1),
            jnp.full((1, t), config.context_noise),
            condition,
            attend=dataclasses.replace(attend, context=cache.context(model.config, seen)),
            positions=position,
            return_kv=True,
        )
        return cache.store(kv, frames, model.config, limit=count), None

    cache, _ = jax.lax.scan(body, play.cache, jnp.arange(layout.slots // t, dtype=jnp.int32))
    return dataclasses.replace(play, cache=cache)


@functools.partial(jax.jit, static_argnames=("first",), donate_argnames=("stream",))
def _decode(
    codec: Codec, latents: Float[Array, "1 t h w c"], stream: Stream, first: bool
) -> tuple[UInt8[Array, "f H W 3"], Stream]:
    video, stream = codec.decode_chunk(latents, stream, first=first)
    return to_uint8(video[0]), stream


class Session:
    """A running world. Not thread-safe; many sessions share one model and its compiled programs."""

    def __init__(
        self,
        model: WorldDiT,
        codec: Codec,
        text_encoder: TextEncoder,
        config: SessionConfig,
        attend: Attend = Attend(),  # noqa: B008 - frozen
    ):
        self._model, self._codec, self._text_encoder = model, codec, text_encoder
        self.config, self._attend = config, attend
        self._state: Snapshot | None = None

    def start(
        self,
        image: UInt8[np.ndarray, "H W 3"] | Float[np.ndarray, "H W 3"],
        prompt: str,
        seed: int = 0,
        intrinsics: Float[np.ndarray, "4"] | None = None,
    ) -> None:
        """Begins a world at an image. The first frame of the first `step` is this image as the model sees it.

        Args:
          image: uint8, or float in [-1, 1]; sides are multiples of the codec's strides.
          intrinsics: fx, fy, cx, cy in pixels of the image; default: `fov`, centred.
        """
        height, width = image.shape[:2]
        stride, patch = self._codec.config.stride, self._model.config.patch
        for name, side, step in (
            ("height", height, stride[1] * patch[1]),
            ("width", width, stride[2] * patch[2]),
        ):
            require(side % step == 0, f"image {name}", side, f"must be a multiple of {step}")
        config, lead = self.config, self.config.lead
        _, encoded = given_frames(self._codec, to_float(image)[None, None], lead)
        if intrinsics is None:
            focal = width / 2 / np.tan(np.radians(config.fov) / 2)
            intrinsics = np.array([focal, focal, width / 2, height / 2])
        h, w = encoded.shape[2:4]
        layout = config.causal.layout(self._model.config, h, w)
        play = Play(
            cache=KVCache.empty(self._model.config, layout, 1),
            latents=jnp.zeros((1, layout.slots, *encoded.shape[2:])),
            relative=jnp.zeros((layout.slots, 4, 4)),
            held=jnp.zeros((layout.slots, len(keyboard.MOVEMENT))),
            lead=encoded,
            intrinsics=jnp.asarray(poses.validate_intrinsics(intrinsics, 1), jnp.float32),
        )
        text = self._encode(prompt)
        walk = Walk(seed, 0, np.eye(4), np.eye(4), np.eye(4), prompt, text, text)
        self._state = Snapshot(play, walk, self._codec.init_stream(1, h, w))

    @property
    def walk(self) -> Walk:
        """Where the session is. Raises RuntimeError before `start` and after `close`."""
        return self._running().walk

    @property
    def transitions(self) -> int:
        """Rows of keys the next `step` takes: one per video frame, without the first frame of the world."""
        chunk, stride = self.config.causal.chunk, self._codec.config.stride[0]
        return stride * (chunk - (self.walk.chunk == 0))

    def step(
        self,
        keys: Shaped[np.ndarray, "n 8"] | Shaped[np.ndarray, "8"],
        c2w: Float64[np.ndarray, "f 4 4"] | None = None,
    ) -> UInt8[np.ndarray, "f H W 3"]:
        """Generates the next chunk under keys W A S D I J K L.

        Args:
          keys: one row a transition (`transitions` of them), or one row that is held for all.
          c2w: recorded poses of the chunk's video frames, in place of the path that the keys give.
        """
        state = self._running()
        keys = np.asarray(keys)
        n, opening = self.transitions, state.walk.chunk == 0
        keys = np.tile(keys, (n, 1)) if keys.ndim == 1 else keys
        require(keys.shape == (n, 8), "keys", keys.shape, f"must be ({n}, 8) or (8,)")
        if n:
            keys = keyboard.check(keys)
        if c2w is not None:
            require(len(c2w) == n + opening, "c2w", np.shape(c2w), f"must be ({n + opening}, 4, 4)")
            c2w = poses.validate(c2w, "c2w")
        walk, relative, held = self._move(state.walk, keys, c2w)
        latents, play = _advance(
            self._model,
            self._codec,
            state.play,
            jnp.asarray(state.walk.tokens()),
            jnp.asarray(relative, jnp.float32),
            jnp.asarray(held, jnp.float32),
            jax.random.key(walk.seed),
            self.config.causal,
            self._attend,
        )
        frames, stream = _decode(self._codec, latents, state.stream, first=state.walk.chunk == 0)
        self._state = Snapshot(play, walk, stream)
        return np.asarray(frames)

    def _move(
        self, walk: Walk, keys: np.ndarray, c2w: np.ndarray | None
    ) -> tuple[Walk, np.ndarray, np.ndarray]:
        """The walk after a chunk, and control poses and movement keys of its latent frames."""
        config, stride = self.config, self._codec.config.stride[0]
        rows = np.concatenate([np.zeros((1, 8), bool), keys.astype(bool)])
        if c2w is None:
            c2w = keyboard.integrate(
                rows, start=walk.c2w, step=config.walk, yaw_degrees=config.turn, pitch_degrees=config.turn
            )
        elif walk.chunk:
            c2w = np.concatenate([walk.c2w[None], c2w])
        else:
            walk = dataclasses.replace(walk, origin=c2w[0], latent_c2w=c2w[0])
        movement = rows[:, : len(keyboard.MOVEMENT)]
        held = plucker.latent_keys(movement, stride)
        latent = c2w[::stride]  # row 0 is the frame before the chunk, or the first of all
        if walk.chunk:
            latent, held = latent[1:], held[1:]
        before = walk.latent_c2w if config.reference == "previous" else walk.origin
        unit = stride * config.walk if config.unit is None else config.unit
        relative = poses.relative(np.concatenate([before[None], latent]), config.reference, unit)[1:]
        moved = dataclasses.replace(walk, chunk=walk.chunk + 1, c2w=c2w[-1], latent_c2w=latent[-1])
        return moved, relative, held

    def say(
        self,
        prompt: str,
        *,
        scope: Literal["global", "local"] = "global",
        chunks: int = 0,
        reencode: bool = False,
    ) -> None:
        """A prompt event from the next chunk on (paper section 5.1).

        Args:
          scope: "global" replaces the prompt ("winter"); "local" adds to it for a while ("fireworks above
            the castle") and then returns to it.
          chunks: global: blend over this many chunks (0: switch at once); local: how many it lasts.
          reencode: also write the cached window again under the new text, so that the model's memory agrees
            with it. Costs a clean pass per cached chunk.
        """
        state = self._running()
        walk = state.walk
        require(scope in ("global", "local"), "scope", scope, "must be 'global' or 'local'")
        require(chunks >= (scope == "local"), "chunks", chunks, "must be at least 1 (local) or 0 (global)")
        if scope == "global":
            tokens, quiet = self._encode(prompt), dataclasses.replace(walk, event=None)
            walk = dataclasses.replace(
                quiet, prompt=prompt, text=tokens, before=quiet.tokens(), blend=chunks, said=walk.chunk
            )
        else:
            tokens = self._encode(f"{walk.prompt} {prompt}")
            walk = dataclasses.replace(walk, event=tokens, until=walk.chunk + chunks)
        play = state.play
        if reencode:
            layout, chunk = play.cache.layout, self.config.causal.chunk
            require(
                layout.sink % chunk == 0 and layout.ring % chunk == 0,
                "reencode",
                f"sink {layout.sink}, ring {layout.ring}",
                f"window and sink must be multiples of causal.chunk = {chunk}",
            )
            play = _reencode(
                self._model, self._codec, play, jnp.asarray(tokens), self.config.causal, self._attend
            )
        self._state = dataclasses.replace(state, play=play, walk=walk)

    def snapshot(self) -> Snapshot:
        """The session at this moment, as a value of its own."""
        return _copy(self._running())

    def restore(self, snapshot: Snapshot) -> None:
        """Continues from a snapshot, which stays good for further restores."""
        self._state = _copy(snapshot)

    def branch(self) -> "Session":
        """A second session with the same past; the compiled programs are shared."""
        other = Session(self._model, self._codec, self._text_encoder, self.config, self._attend)
        other.restore(self._running())
        return other

    def close(self) -> None:
        """Frees the device memory of this session; `start` or `restore` opens it again."""
        self._state = None

    def _running(self) -> Snapshot:
        if self._state is None:
            raise RuntimeError("session: not running; call start(image, prompt, seed) first")
        return self._state

    def _encode(self, prompt: str) -> Float[np.ndarray, "1 l d"]:
        require(bool(prompt.strip()), "prompt", prompt, "is empty")
        return np.asarray(self._text_encoder.encode([prompt]))


def _copy(state: Snapshot) -> Snapshot:
    """Device arrays are donated to the next step: whoever keeps them needs copies."""
    copied = jax.tree.map(jnp.copy, (state.play, state.stream))
    return Snapshot(copied[0], state.walk, copied[1])
