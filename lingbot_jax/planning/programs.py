"""The programs of a run, lowered for a TPU pod that need not exist: the very ones that training runs."""

import dataclasses
import os
import re
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from lingbot_jax.config import ConfigError, require
from lingbot_jax.models.control import is_adapter
from lingbot_jax.models.flops import Flops, forward_flops
from lingbot_jax.parallel import sharding
from lingbot_jax.parallel.chips import Chip, chip
from lingbot_jax.parallel.mesh import SEQ, make_mesh
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.training.curriculum import spans
from lingbot_jax.training.objectives import Objective
from lingbot_jax.training.start import objective_of, resolve
from lingbot_jax.training.state import TrainState, abstract_state
from lingbot_jax.training.step import Program, encode_program, make_step, networks_of, update_counts
from lingbot_jax.worlds.config import pixels_per_token

PERIOD = 100  # steps after which no other kind of step comes


@dataclasses.dataclass(frozen=True)
class Where:
    """What a run is planned for.

    Attributes:
      topology: TPU generation and shape, as v5p:8x8x4. slices: of that shape, joined along `data`.
      height, width: of the video in pixels; None: the config's.
    """

    topology: str
    slices: int = 1
    height: int | None = None
    width: int | None = None


def topology_devices(name: str, slices: int = 1) -> list[jax.Device]:
    """Devices of a TPU topology that need not exist. Raises ConfigError for an unknown one."""
    # No metadata server here, and several compilers may run at once: there is no device to lock.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    many: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if re.fullmatch(r"\w+:1(x1)+", name):  # libtpu takes hosts of four chips unless told
        many["chips_per_host_bounds"] = (1, 1, 1)
    chip(name)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **many).devices
    except Exception as error:  # libtpu raises several types
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"--topology={name}: {reason}; give e.g. v5e:4x8, v5p:8x8x4, v6e:8x8, tpu7x:4x4x4"
        ) from None


def latents_of(config: TrainConfig) -> tuple[int, int, int]:
    """Frames, height, width of a sample in latent pixels."""
    codec, (height, width) = config.world.codec, config.size
    return codec.latent_frames(config.data.frames), height // codec.stride[1], width // codec.stride[2]


def tokens_of(config: TrainConfig) -> int:
    """Tokens of a sample."""
    frames, height, width = latents_of(config)
    _, rows, columns = config.world.network.patch
    return frames * (height // rows) * (width // columns)


@dataclasses.dataclass(frozen=True)
class Case:
    """One phase of a run on the devices of a topology.

    Attributes:
      run: the whole run, its world complete. phase: index. config: the run as the phase sees it, with a size.
      where: what it is planned for. mesh, chip: of the phase there.
    """

    run: TrainConfig
    phase: int
    config: TrainConfig
    where: Where
    mesh: Mesh
    chip: Chip

    @property
    def rows(self) -> int:
        """Parts that the samples of a batch are split into."""
        return self.mesh.size // self.mesh.shape[SEQ]

    @property
    def objective(self) -> Objective:
        return objective_of(self.run)

    @property
    def adapters_only(self) -> bool:
        """Whether nothing but adapters trains."""
        return all(is_adapter(path) for tree in self.state().ema.values() for path in tree)

    @property
    def forward(self) -> Flops:
        """Of a sample."""
        return forward_flops(self.config.world.network, *latents_of(self.config))

    def state(self) -> TrainState:
        """The abstract state of the run, of all its networks. Raises ConfigError: sizes that do not divide."""
        counts = update_counts(self.run, self.objective)
        return abstract_state(self.config, self.mesh, self.objective.trains, counts)

    def encode(self) -> Program:
        """(codec, text encoder, clips) -> encoded clips."""
        return encode_program(self.config, self.mesh)

    def train(self) -> Program:
        """(state, encoded clips, constants) -> (state, metrics): the first step of the phase that needs most networks.

        Of a run with two experts it is the step of one of them; the other's has the same sizes.
        """
        encode = self.encode()
        with jax.set_mesh(self.mesh):
            encoded = jax.eval_shape(encode.fn, *encode.args)
        placed = jax.tree.map(lambda _: sharding.batch_sharding(self.mesh), encoded)
        first, end = spans(self.run)[self.phase]
        steps = (self.objective.updates(step) for step in range(first, min(end, first + PERIOD)))
        updates = max(steps, key=lambda updates: len(networks_of(updates)))
        return make_step(self.objective, self.config, self.mesh, updates, sharding.specs(encoded, placed))


def chosen(run: TrainConfig, where: Where, phase: int) -> tuple[TrainConfig, TrainConfig]:
    """The run with its world complete, and as one phase sees it, with a size.

    The world's networks, codec and text encoder are the config's own, else those that its `init` and `codec` have.

    Raises:
      ConfigError: a phase that there is not, sizes that do not fit the model, or no size at all.
    """
    count = len(run.phases())
    if not 0 <= phase < count:
        has = f"curriculum[0] to [{count - 1}]" if run.curriculum else "no curriculum"
        raise ConfigError(f"--phase={phase}: the config has {has}")
    world = run.world
    if not (world.networks and world.codec and world.text):
        run = resolve(run)
    run.check_crops()
    run = longest_rollouts(run, phase) if run.stage == "distill" else run
    config = run.phases()[phase]
    return run, dataclasses.replace(config, size=_size(config, where))


def longest_rollouts(run: TrainConfig, phase: int) -> TrainConfig:
    """The run with the rollouts that cost most, whose loops run a known number of times: what a plan is of."""
    longest = run.world.codec.latent_frames(run.phases()[phase].data.frames) // run.world.causal.chunk
    return dataclasses.replace(
        run, distill=dataclasses.replace(run.distill, shortest=longest, exit_step="last")
    )


def case(run: TrainConfig, where: Where, phase: int = 0) -> Case:
    """One phase of a run on a topology. Raises ConfigError: as `chosen`, and sizes that do not fit the mesh."""
    run, config = chosen(run, where, phase)
    mesh = make_mesh(config.mesh, topology_devices(where.topology, where.slices))
    made = Case(run, phase, config, where, mesh, chip(where.topology))
    batch, parts = config.data.batch, config.optimizer.grad_accum_steps
    why = f"a microstep of {batch // parts} clips must divide over data x fsdp = {made.rows}"
    require(batch // parts % made.rows == 0, field(run, phase, "data.batch"), batch, why)
    return made


def _size(config: TrainConfig, where: Where) -> tuple[int, int]:
    """Height and width of the video. Raises ConfigError."""
    found = []
    given, multiples = (where.height, where.width), pixels_per_token(config.world.network)
    for name, flag, own, multiple in zip(("height", "width"), given, config.size, multiples, strict=True):
        value = own if flag is None else flag
        why = "the config has no size; " if flag is None else ""
        if value <= 0 or value % multiple:
            raise ConfigError(f"--{name}={value}: {why}give a multiple of {multiple} pixels")
        found.append(value)
    return tuple(found)


# Fields that a phase may have of its own: path in the run -> name in the phase.
OF_PHASE = {
    "data.batch": "batch",
    "optimizer.grad_accum_steps": "grad_accum_steps",
    "mesh.data": "mesh.data",
    "mesh.fsdp": "mesh.fsdp",
    "mesh.seq": "mesh.seq",
}


def field(run: TrainConfig, phase: int, path: str) -> str:
    """The name, as flags have it, of the field that a phase takes a value from: its own, or the run's."""
    name = OF_PHASE.get(path)
    if run.curriculum and name and getattr(run.curriculum[phase], name.partition(".")[0]) is not None:
        return f"config.curriculum[{phase}].{name}"
    return f"config.{path}"
