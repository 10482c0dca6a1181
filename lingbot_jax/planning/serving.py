"""The programs that serving runs, lowered for TPUs that need not be there: the very ones that a session calls.

chunk    `rollout.device.advance` and `decode`: one chunk of a session whose window is full
decode   `decode` alone
sample   `rollout.sample`: a whole clip, all steps and the decoder
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lingbot_jax.config import require
from lingbot_jax.parallel import sharding
from lingbot_jax.parallel.chips import Chip, chip
from lingbot_jax.parallel.mesh import SEQ, WHOLE, make_mesh
from lingbot_jax.planning.programs import Where, chosen, topology_devices
from lingbot_jax.rollout import device, sample
from lingbot_jax.rollout.session import SessionConfig
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.training.step import Program
from lingbot_jax.worlds.clips import Encoded
from lingbot_jax.worlds.condition import Camera, Conditioning
from lingbot_jax.worlds.open import SERVING, abstract_world
from lingbot_jax.worlds.world import World

SERVING_DTYPE = jnp.bfloat16  # of transformer and text encoder, as `experiments.serve` opens them on a TPU


@dataclasses.dataclass(frozen=True)
class Serving:
    """A world on the devices of a topology.

    Attributes:
      world: abstract, where `open_world` would put it. size: height and width of the video in pixels.
      frames: of a clip that is sampled whole. where: what it is planned for. chip: of it.
    """

    world: World
    size: tuple[int, int]
    frames: int
    where: Where
    chip: Chip

    @property
    def weights(self) -> str:
        """Whether parameters are split over the devices or whole on each."""
        return "whole" if WHOLE in self.world.mesh.shape else "split"

    @property
    def latent(self) -> tuple[int, int]:
        """Height and width of a latent frame."""
        _, rows, columns = self.world.codec.config.stride
        return self.size[0] // rows, self.size[1] // columns

    @property
    def session(self) -> SessionConfig:
        """How the world is played. Raises ConfigError: it does not generate chunks."""
        require(self.world.config.causal is not None, "config.world.causal", None, "needed to play")
        return SessionConfig.of(self.world.config)

    def _whole(self, tree):
        """With every array whole on every device."""
        whole = NamedSharding(self.world.mesh, PartitionSpec())
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
        return jax.tree.map(place, tree)

    def _array(self, *shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return self._whole(jax.ShapeDtypeStruct(shape, dtype))

    def check(self, *, cached: bool) -> None:
        """Raises ConfigError unless a frame's tokens, and heads of a cache, divide over the devices."""
        mesh, network = self.world.mesh, self.world.config.network
        _, rows, columns = network.patch
        tokens = self.latent[0] // rows * (self.latent[1] // columns)
        sharding.check_divides("tokens per latent frame", tokens, (SEQ,), mesh)
        if cached:
            sharding.check_divides("heads of the cache", network.heads, (SEQ,), mesh)

    def _conditioning(self, frames: int) -> Conditioning:
        network, size = self.world.config.network, self.latent
        return Conditioning(
            self._array(1, frames, *size, network.mask_channels),
            self._array(1, frames, *size, network.latent_channels),
        )

    def state(self) -> device.DeviceState:
        """The device part of a session, where `DeviceState.start` puts it."""
        session, model = self.session, next(iter(self.world.networks.values()))
        known, intrinsics = self._conditioning(session.conditioning_frames), self._array(1, 1, 4)
        with jax.set_mesh(self.world.mesh):
            start = lambda m, k, i: device.DeviceState.start(m, session.causal, k, i)
            state = self._whole(jax.eval_shape(start, model, known, intrinsics))
            held = NamedSharding(self.world.mesh, sharding.cache_spec(state.cache.keys.shape))
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=held)
        cache = dataclasses.replace(
            state.cache, keys=place(state.cache.keys), values=place(state.cache.values)
        )
        return dataclasses.replace(state, cache=cache)

    def advance(self) -> Program:
        """One chunk: (state, text, camera, key) -> (latents, state). Raises ConfigError."""
        self.check(cached=True)
        causal, text = self.session.causal, self.world.config.text
        rows = 2 if causal.guided else 1
        args = (
            next(iter(self.world.networks.values())),
            self.state(),
            self._array(rows, text.length, text.dim),
            self._array(causal.chunk, 4, 4),
            self._array(causal.chunk, 4),
            self._whole(jax.eval_shape(lambda: jax.random.key(0))),
            self.world.attend,
            causal,
        )
        return Program(device.advance, args, self.world.mesh)

    def decode(self) -> Program:
        """The frames of one chunk that does not open the world: (latents, stream) -> (uint8 frames, stream)."""
        codec, (height, width) = self.world.codec, self.latent
        with jax.set_mesh(self.world.mesh):
            stream = jax.eval_shape(lambda c: c.init_stream(1, height, width), codec)
            columns = lambda x: NamedSharding(self.world.mesh, sharding.columns_spec(x.shape))
            stream = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=columns(x)), stream
            )
        latents = self._array(1, self.session.causal.chunk, height, width, codec.config.channels)
        return Program(device.decode, (codec, latents, stream, False), self.world.mesh)

    def sample(self) -> Program:
        """One clip: (encoded condition) -> video. Raises ConfigError."""
        self.check(cached=False)
        world, config = self.world, sample.sample_config(self.world.config)
        frames, text = world.codec.config.latent_frames(self.frames), world.config.text
        tokens = self._array(1, text.length, text.dim)
        camera = Camera(self._array(1, frames, 4, 4), self._array(1, 1, 4), self._array(1, frames, 4))
        encoded = Encoded(None, tokens, camera, self._conditioning(frames))
        args = (
            world.networks,
            world.codec,
            encoded,
            tokens if config.guidance.guided else None,
            self._array(dtype=jnp.uint32),
            self._array(1, dtype=jnp.int32),
            world.attend,
            world.config.boundary,
            config,
            None,
        )
        return Program(sample.clip, args, world.mesh)


def serving(run: TrainConfig, where: Where, weights: str = SERVING.weights) -> Serving:
    """The world of a run on a topology.

    Args:
      weights: split or whole, as `MeshConfig.weights`.

    Raises:
      ConfigError: as `programs.chosen`, and sizes that do not divide.
    """
    _, config = chosen(run, where, 0)
    layout = dataclasses.replace(SERVING, weights=weights)
    mesh = make_mesh(layout, topology_devices(where.topology, where.slices))
    world = abstract_world(config.world, mesh, SERVING_DTYPE)
    return Serving(world, config.size, config.data.frames, where, chip(where.topology))
