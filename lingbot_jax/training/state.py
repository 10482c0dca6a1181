"""The training state: dictionaries by network name, and nothing that knows what the names mean.

A network that has an optimiser entry trains, one that has none is frozen; which of its paths have gradients and
moments is the objective's business (`trains`). Averages (`ema`) are kept of what trains in the networks of the world.
Randomness is not part of the state: every draw is `fold_in(seed, step, purpose)`, so there is nothing to lose on
resume.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from lingbot_jax.models import params
from lingbot_jax.parallel import sharding
from lingbot_jax.training.config import OptimizerConfig, TrainConfig
from lingbot_jax.training.networks import FAKE, HEAD, makers, templates
from lingbot_jax.worlds.world import Arrays, specs

Trains = Callable[[str, str], bool]  # (network, parameter path) -> whether it has a gradient


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Attributes:
    step: updates done. params: all parameters by dotted path, float32. ema: averages of those of the world that train.
    opt: optax state of every network that trains.
    """

    step: Int[Array, ""]
    params: dict[str, Arrays]
    ema: dict[str, Arrays]
    opt: dict[str, optax.OptState]

    def part(self, networks: Iterable[str]) -> "TrainState":
        """Of some networks only: what a step that reads no others is given."""
        of = lambda tree: {name: tree[name] for name in networks if name in tree}
        return TrainState(self.step, of(self.params), of(self.ema), of(self.opt))

    def updated(self, part: "TrainState") -> "TrainState":
        """With the networks of a part exchanged for what a step made of them."""
        return TrainState(part.step, self.params | part.params, self.ema | part.ema, self.opt | part.opt)


def random_key(seed: int, step: Int[Array, ""] | int, purpose: str) -> PRNGKeyArray:
    """The key of one purpose at one step."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.fold_in(key, zlib.crc32(purpose.encode()))


def learning_rate(config: OptimizerConfig, updates: int, peak: float | None = None) -> optax.Schedule:
    """Rate by update of a network that gets `updates` of them: warm-up, then constant or cosine to zero."""
    peak = config.learning_rate if peak is None else peak
    warmup = min(config.warmup, updates)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, max(updates - warmup, 1)),
    }[config.decay]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def optimizer_of(config: TrainConfig, network: str) -> OptimizerConfig:
    """How a network is updated: the fake scores and the head at rates of their own."""
    own = config.optimizer
    if network != HEAD and not network.startswith(FAKE):
        return own
    share = config.distill.critic_rate
    return dataclasses.replace(own, learning_rate=own.learning_rate * share, muon_rate=own.muon_rate * share)


def make_optimizer(config: OptimizerConfig, updates: int) -> optax.GradientTransformation:
    """The optimiser of one network. Gains, biases and modulation vectors are not decayed: decay is for matrices."""
    decayed = lambda arrays: {path: path.endswith("kernel") for path in arrays}
    rate, muon = learning_rate(config, updates), config.algorithm == "muon"
    adamw = optax.adamw(
        rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=decayed, nesterov=muon
    )
    if not muon:
        return optax.chain(optax.clip_by_global_norm(config.clip), adamw)
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)  # [layers in out]
    orthogonal = optax.contrib.muon(
        learning_rate(config, updates, config.muon_rate),
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=lambda arrays: dict.fromkeys(arrays, axes),
    )
    block = lambda path: path.startswith("blocks.") and path.endswith("kernel")
    label = lambda arrays: {path: "muon" if block(path) else "adamw" for path in arrays}
    update = optax.partition({"muon": orthogonal, "adamw": adamw}, label)
    return optax.chain(optax.clip_by_global_norm(config.clip), update)


def random_params(config: TrainConfig) -> dict[str, Arrays]:
    """Freshly initialised parameters of every network. Pure: trace it, so that each is made in its place."""
    made = {}
    for name, make in makers(config).items():
        made[name] = params.arrays_of(make(random_key(config.seed, 0, f"init {name}")))
    return made


def init_state(
    config: TrainConfig, arrays: dict[str, Arrays], trains: Trains, updates: dict[str, int]
) -> TrainState:
    """A fresh state around existing parameters. `updates`: how many each network gets in the run."""
    trained = {
        name: {path: leaf for path, leaf in tree.items() if trains(name, path)}
        for name, tree in arrays.items()
    }
    trained = {name: tree for name, tree in trained.items() if tree}
    opt = {
        name: make_optimizer(optimizer_of(config, name), updates[name]).init(tree)
        for name, tree in trained.items()
    }
    ema = {name: jax.tree.map(jnp.copy, trained[name]) for name in config.world.networks if name in trained}
    return TrainState(jnp.zeros((), jnp.int32), arrays, ema, opt)


def abstract_state(config: TrainConfig, mesh: Mesh, trains: Trains, updates: dict[str, int]) -> TrainState:
    """Shapes of the state with shardings: what a checkpoint is restored onto, and what plans are made of.

    Raises:
      ConfigError: sizes that the mesh does not divide.
    """
    modules = templates(config)
    arrays = {name: specs(module, mesh) for name, module in modules.items()}
    state = jax.eval_shape(lambda a: init_state(config, a, trains, updates), arrays)
    axes = {name: params.logical_axes(module) for name, module in modules.items()}
    place = lambda part: {
        name: sharding.shardings_by_path(tree, axes[name], mesh) for name, tree in part.items()
    }
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return sharding.specs(state, TrainState(whole, *map(place, (state.params, state.ema, state.opt))))
