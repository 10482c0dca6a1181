"""An interactive session: a world that is walked chunk by chunk, steered by text, and branched.

    session = lingbot_jax.open_world("runs/demo/action").session()
    session.start(image, "a castle by a lake", seed=1)
    frames = session.step(keys)                    # uint8 video frames of the next chunk
    session.set_prompt("winter, heavy snow")       # from the next chunk on
    other = session.branch()                       # the same past, another future (paper section 5.1)

Everything that changes is a value, `DeviceState` on the devices and `HostState` on the host; a step maps them to
new ones. Randomness depends on (seed, chunk number) only, so the same seed, keys and events give the same frames,
also from a restored snapshot.
"""

import dataclasses
import functools
import logging
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Shaped, UInt8
from pydantic import Field

from lingbot_jax.config import Positive, config, require
from lingbot_jax.control import keyboard, plucker, poses
from lingbot_jax.models.codec import Stream, to_float
from lingbot_jax.parallel import multihost
from lingbot_jax.parallel.mesh import BATCH_AXES
from lingbot_jax.rollout import causal, device
from lingbot_jax.rollout.device import DeviceState
from lingbot_jax.worlds.condition import conditioning_frames
from lingbot_jax.worlds.config import CausalConfig, KeyboardConfig, WorldConfig
from lingbot_jax.worlds.world import World

_log = logging.getLogger(__name__)


@config
class SessionConfig:
    """How a world is played. `of` takes what is not given from the world."""

    causal: CausalConfig = Field(description="chunks, window and levels")
    keyboard: KeyboardConfig = Field(description="what a key does")
    fov: Annotated[float, Field(gt=0, lt=180, allow_inf_nan=False)] = Field(
        90.0, description="horizontal field of view in degrees, where start is given no intrinsics"
    )
    unit: Positive | None = Field(
        None,
        description="world units that count as 1 in the camera embedding; None: a latent frame's walk, or 1 (metric)",
    )
    conditioning_frames: Annotated[int, Field(ge=1, le=4096)] = Field(
        31,
        description="latent frames (the image, then grey) encoded at the start; later ones are as the last",
    )

    def __post_init__(self):
        require(self.causal.window is not None, "causal.window", None, "play has no end and needs a window")

    @classmethod
    def of(cls, world: WorldConfig, **given: Any) -> "SessionConfig":
        """A world's own settings, with those given exchanged.

        Raises:
          ConfigError: a world of two experts, which samples whole clips only; or a value out of range.
        """
        names = sorted(world.networks)
        require(
            len(names) == 1, "world.networks", names, "chunks need a world of one network; use --mode=base"
        )
        causal = given.pop("causal", None) or causal_config(world)
        return cls(causal=causal, **{"keyboard": world.keyboard} | given)


def causal_config(world: WorldConfig) -> CausalConfig:
    """How a world generates chunks; one that was not made for it, as the published fast model does."""
    if world.causal is not None:
        return world.causal
    _log.warning(
        "this world was not post-trained to generate chunks: expect it to drift (docs/generation.md)"
    )
    return CausalConfig(shift=5.0 if world.sample is None else world.sample.shift)


@dataclasses.dataclass(frozen=True)
class HostState:
    """The host part of a session.

    Attributes:
      seed: of the noise. chunk: chunks generated. c2w: pose of the last video frame. latent_c2w: of the last
        latent frame. origin: of the first.
      prompt: the lasting prompt. text: its tokens. before, blend, since: the text blends from `before` over
        `blend` chunks since chunk `since`. event, end_chunk: tokens of a passing event, up to that chunk.
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
    since: int = 0
    event: Float[np.ndarray, "1 l d"] | None = None
    end_chunk: int = 0

    def tokens(self) -> Float[np.ndarray, "1 l d"]:
        """Text tokens of the next chunk."""
        if self.event is not None and self.chunk < self.end_chunk:
            return self.event
        share = 1.0 if self.blend == 0 else min(1.0, (self.chunk - self.since + 1) / (self.blend + 1))
        return (self.before + np.float32(share) * (self.text - self.before)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Everything a session is, at a moment: restore it as often as you like."""

    device: DeviceState
    host: HostState
    stream: Stream


class Session:
    """A running world. Not thread-safe; many sessions share one world and its compiled programs.

    On several processes all of them make the same calls.
    """

    def __init__(self, world: World, **settings: Any):
        """`settings`: fields of SessionConfig in place of the world's own.

        Raises:
          ConfigError: settings out of range, or a mesh on which one sample cannot lie.
        """
        rows = tuple(world.mesh.shape[axis] for axis in BATCH_AXES)
        require(rows == (1, 1), "mesh data, fsdp", rows, "must be 1, 1: a session is one sample; use seq")
        self.world = world
        self.config = SessionConfig.of(world.config, **settings)
        self._model = next(iter(world.networks.values()))
        self._state: Snapshot | None = None
        self._negative = None
        if self.config.causal.guided:
            self._negative = multihost.to_host(world.encode_negative(self.config.causal.sample))

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
        stride, patch = self.world.codec.config.stride, self._model.config.patch
        for name, side, step in (
            ("height", height, stride[1] * patch[1]),
            ("width", width, stride[2] * patch[2]),
        ):
            require(side % step == 0, f"image {name}", side, f"must be a multiple of {step}")
        if intrinsics is None:
            focal = width / 2 / np.tan(np.radians(self.config.fov) / 2)
            intrinsics = np.array([focal, focal, width / 2, height / 2])
        rows = poses.validate_intrinsics(intrinsics, 1).astype(np.float32)[None]
        text = self._encode(prompt)
        host = HostState(seed, 0, np.eye(4), np.eye(4), np.eye(4), prompt, text, text)
        with jax.set_mesh(self.world.mesh):
            frames = to_float(np.asarray(image))[None, None]
            known = _conditioning(self.world.codec, frames, self.config.conditioning_frames)
            state = _start(self._model, self.config.causal, known, rows)
            stream = self.world.codec.init_stream(1, *known.image.shape[2:4])
        self._state = Snapshot(state, host, stream)

    @property
    def host(self) -> HostState:
        """Where the session is. Raises RuntimeError before `start` and after `close`."""
        return self._running().host

    @property
    def transitions(self) -> int:
        """Rows of keys the next `step` takes: one per video frame, without the first frame of the world."""
        chunk, stride = self.config.causal.chunk, self.world.codec.config.stride[0]
        return stride * (chunk - (self.host.chunk == 0))

    def step(
        self,
        keys: Shaped[np.ndarray, "n 8"] | Shaped[np.ndarray, "8"],
        c2w: Float64[np.ndarray, "f 4 4"] | None = None,
    ) -> UInt8[np.ndarray, "f H W 3"]:
        """Generates the next chunk under keys W A S D I J K L.

        Args:
          keys: one row per transition (`transitions` of them), or one row that is held for all.
          c2w: recorded poses of the chunk's video frames, in place of the path that the keys give.
        """
        state, config = self._running(), self.config.causal
        keys = np.asarray(keys)
        n, opening = self.transitions, state.host.chunk == 0
        causal.check_length(config, (state.host.chunk + 1) * config.chunk)
        keys = np.tile(keys, (n, 1)) if keys.ndim == 1 else keys
        require(keys.shape == (n, 8), "keys", keys.shape, f"must be ({n}, 8) or (8,)")
        if n:
            keys = keyboard.check(keys)
        if c2w is not None:
            require(len(c2w) == n + opening, "c2w", np.shape(c2w), f"must be ({n + opening}, 4, 4)")
            c2w = poses.validate(c2w, "c2w")
        host, relative, actions = self._move(state.host, keys, c2w)
        world, f32 = self.world, functools.partial(np.asarray, dtype=np.float32)
        key = jax.random.key(host.seed)
        with jax.set_mesh(world.mesh):
            latents, moved = device.advance(
                self._model,
                state.device,
                self._branches(state.host.tokens()),
                f32(relative),
                f32(actions),
                key,
                world.attend,
                config,
            )
            frames, stream = device.decode(world.codec, latents, state.stream, first=opening)
        self._state = Snapshot(moved, host, stream)
        return multihost.to_host(frames)

    def _move(
        self, host: HostState, keys: np.ndarray, c2w: np.ndarray | None
    ) -> tuple[HostState, np.ndarray, np.ndarray]:
        """The host state after a chunk, and relative poses and actions of its latent frames."""
        keys_do, pose = self.config.keyboard, self.world.config.pose
        stride = self.world.codec.config.stride[0]
        rows = np.concatenate([np.zeros((1, 8), bool), keys.astype(bool)])
        if c2w is None:
            turn = keys_do.turn_rate
            c2w = keyboard.integrate(
                rows, start=host.c2w, step=keys_do.step_size, yaw_degrees=turn, pitch_degrees=turn
            )
        elif host.chunk:
            c2w = np.concatenate([host.c2w[None], c2w])
        else:
            host = dataclasses.replace(host, origin=c2w[0], latent_c2w=c2w[0])
        actions = plucker.latent_keys(rows[:, : len(keyboard.MOVEMENT)], stride)
        latent = c2w[::stride]  # row 0 is the frame before the chunk, or the first of all
        if host.chunk:
            latent, actions = latent[1:], actions[1:]
        before = host.latent_c2w if pose.reference == "previous" else host.origin
        walk = 1.0 if pose.translation == "metric" else stride * keys_do.step_size
        unit = walk if self.config.unit is None else self.config.unit
        relative = poses.relative(np.concatenate([before[None], latent]), pose.reference, unit)[1:]
        moved = dataclasses.replace(host, chunk=host.chunk + 1, c2w=c2w[-1], latent_c2w=latent[-1])
        return moved, relative, actions

    def set_prompt(
        self,
        prompt: str,
        *,
        scope: Literal["global", "local"] = "global",
        chunks: int = 0,
        rebuild_cache: bool = False,
    ) -> None:
        """A prompt event from the next chunk on (paper section 5.1).

        Args:
          scope: "global" replaces the prompt ("winter"); "local" adds to it for a while ("fireworks above
            the castle") and then returns to it.
          chunks: global: blend over this many chunks (0: switch at once); local: how many it lasts.
          rebuild_cache: also write the cached window again under the new text, so that the model's memory agrees
            with it. Costs a cache-update pass per cached chunk.
        """
        state, host = self._running(), self.host
        require(scope in ("global", "local"), "scope", scope, "must be 'global' or 'local'")
        require(chunks >= (scope == "local"), "chunks", chunks, "must be at least 1 (local) or 0 (global)")
        if scope == "global":
            tokens, quiet = self._encode(prompt), dataclasses.replace(host, event=None)
            host = dataclasses.replace(
                quiet, prompt=prompt, text=tokens, before=quiet.tokens(), blend=chunks, since=host.chunk
            )
        else:
            tokens = self._encode(f"{host.prompt} {prompt}")
            host = dataclasses.replace(host, event=tokens, end_chunk=host.chunk + chunks)
        changed = state.device
        if rebuild_cache:
            layout, chunk = changed.cache.layout, self.config.causal.chunk
            whole = layout.sink % chunk == 0 and layout.ring % chunk == 0
            what = f"sink {layout.sink}, ring {layout.ring}"
            require(
                whole, "rebuild_cache", what, f"window and sink must be multiples of causal.chunk = {chunk}"
            )
            with jax.set_mesh(self.world.mesh):
                changed = device.rebuild_cache(
                    self._model, changed, self._branches(tokens), self.world.attend, self.config.causal
                )
        self._state = dataclasses.replace(state, device=changed, host=host)

    def snapshot(self) -> Snapshot:
        """The session at this moment, as a value of its own."""
        return _copy(self._running())

    def restore(self, snapshot: Snapshot) -> None:
        """Continues from a snapshot, which stays good for further restores."""
        self._state = _copy(snapshot)

    def branch(self) -> "Session":
        """A second session with the same past; the compiled programs are shared."""
        other = Session(self.world, **vars(self.config))
        other.restore(self._running())
        return other

    def close(self) -> None:
        """Frees the device memory of this session; `start` or `restore` opens it again."""
        self._state = None

    def _running(self) -> Snapshot:
        if self._state is None:
            raise RuntimeError("session: not running; call start(image, prompt, seed) first")
        return self._state

    def _branches(self, tokens: Float[np.ndarray, "1 l d"]) -> Float[np.ndarray, "b l d"]:
        """The text of a chunk's branches: with guidance that of the unconditional one as well."""
        return tokens if self._negative is None else np.concatenate([tokens, self._negative])

    def _encode(self, prompt: str) -> Float[np.ndarray, "1 l d"]:
        require(bool(prompt.strip()), "prompt", prompt, "is empty")
        return multihost.to_host(self.world.encode_text([prompt]))


_conditioning = jax.jit(
    lambda codec, frames, latent_frames: conditioning_frames(
        codec, frames, jnp.ones(1, jnp.int32), latent_frames
    ),
    static_argnums=2,
)
_start = jax.jit(DeviceState.start, static_argnums=1)


def _copy(state: Snapshot) -> Snapshot:
    """Device arrays are donated to the next step: whoever keeps them needs copies."""
    copied: tuple[DeviceState, Array] = jax.tree.map(jnp.copy, (state.device, state.stream))
    return Snapshot(copied[0], state.host, copied[1])
