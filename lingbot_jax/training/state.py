"""Training state: flat dictionaries of arrays by parameter path, split into trainable and frozen.

Frozen parameters have neither gradients nor optimiser state. Randomness is not part of the state: every draw is
`fold_in(seed, step, purpose)`, so there is nothing to lose on resume.
"""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int, PRNGKeyArray

from lingbot_jax.models import params
from lingbot_jax.models.dit import WorldDiT
from lingbot_jax.training.config import OptimizerConfig, TrainConfig
from lingbot_jax.training.objectives.action import trains

Arrays = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Attributes:
    step: updates done. trainable, frozen: parameters by dotted path. ema: averaged trainable parameters.
    optimizer: optax state over `trainable`.
    """

    step: Int[Array, ""]
    trainable: Arrays
    frozen: Arrays
    ema: Arrays
    optimizer: optax.OptState


def random_key(seed: int, step: Int[Array, ""] | int, purpose: str) -> PRNGKeyArray:
    """The key of one purpose at one step."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.fold_in(key, zlib.crc32(purpose.encode()))


def abstract_model(config: TrainConfig) -> WorldDiT:
    return params.abstract(lambda key: WorldDiT(config.model, key))


def flatten(model: WorldDiT) -> Arrays:
    """Parameter arrays by dotted path."""
    return {path: leaf.get_value() for path, leaf in params.flat_params(model).items()}


def merge(template: WorldDiT, arrays: Arrays) -> WorldDiT:
    """The model with these parameters; `template` gives the structure and may be abstract."""
    graph, state = nnx.split(template, nnx.Param)
    flat = nnx.to_flat_state(state)
    values = [(path, leaf.replace(arrays[".".join(str(p) for p in path)])) for path, leaf in flat]
    return nnx.merge(graph, nnx.from_flat_state(values))


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    warmup = min(config.warmup, steps)
    rate = optax.linear_schedule(0.0, config.learning_rate, warmup) if warmup else None
    after = {
        "constant": optax.constant_schedule(config.learning_rate),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, max(steps - warmup, 1)),
    }[config.decay]
    schedule = optax.join_schedules([rate, after], [warmup]) if rate else after
    # Gains, biases and modulation vectors are not decayed: decay is for matrices.
    decayed = lambda arrays: {
        path: leaf.ndim > 1 and path.endswith("kernel") for path, leaf in arrays.items()
    }
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(schedule, config.b1, config.b2, weight_decay=config.weight_decay, mask=decayed),
    )


def random_arrays(config: TrainConfig) -> Arrays:
    """Freshly initialised parameters."""
    return flatten(WorldDiT(config.model, random_key(config.seed, 0, "init")))


def abstract_state(config: TrainConfig) -> TrainState:
    """The state's shapes and types; nothing is allocated."""
    return jax.eval_shape(lambda: init_state(config, random_arrays(config)))


def init_state(config: TrainConfig, arrays: Arrays) -> TrainState:
    """A fresh state around existing parameters."""
    trainable = {path: leaf for path, leaf in arrays.items() if trains(config.stage, path)}
    frozen = {path: leaf for path, leaf in arrays.items() if path not in trainable}
    optimizer = make_optimizer(config.optimizer, config.steps)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        frozen=frozen,
        ema=jax.tree.map(jnp.copy, trainable),
        optimizer=optimizer.init(trainable),
    )
