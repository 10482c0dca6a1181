"""Training state: flat dictionaries of arrays by parameter path, split into trainable and frozen.

Frozen parameters have neither gradients nor optimiser state. Randomness is not part of the state: every draw is
`fold_in(seed, step, purpose)`, so there is nothing to lose on resume.

A run with two experts has both in one state, parameters by path `high.…` and `low.…`, and an optimiser state
for each. A step sees one of them (`take_expert`) under the paths of a model of its own.
"""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx
from jaxtyping import Array, Int, PRNGKeyArray

from lingbot_jax.models import params
from lingbot_jax.models.dit import WorldDiT
from lingbot_jax.models.experts import NoiseExperts
from lingbot_jax.training.config import EXPERTS, Expert, OptimizerConfig, TrainConfig
from lingbot_jax.training.objectives.action import trains

Arrays = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Attributes:
    step: updates done. trainable, frozen: parameters by dotted path. ema: averaged trainable parameters.
    optimizer: optax state over `trainable`; for two experts a dict of one each.
    """

    step: Int[Array, ""]
    trainable: Arrays
    frozen: Arrays
    ema: Arrays
    optimizer: optax.OptState | dict[Expert, optax.OptState]


def random_key(seed: int, step: Int[Array, ""] | int, purpose: str) -> PRNGKeyArray:
    """The key of one purpose at one step."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.fold_in(key, zlib.crc32(purpose.encode()))


def make_model(config: TrainConfig, key: PRNGKeyArray) -> WorldDiT | NoiseExperts:
    if config.expert == "both":
        return NoiseExperts(config.model, key, config.flow.boundary)
    return WorldDiT(config.model, key)


def abstract_model(config: TrainConfig) -> WorldDiT | NoiseExperts:
    return params.abstract(lambda key: make_model(config, key))


def flatten(model: WorldDiT | NoiseExperts) -> Arrays:
    """Parameter arrays by dotted path."""
    return {path: leaf.get_value() for path, leaf in params.flat_params(model).items()}


def merge(template: WorldDiT | NoiseExperts, arrays: Arrays) -> WorldDiT | NoiseExperts:
    """The model with these parameters; `template` gives the structure and may be abstract."""
    graph, state = nnx.split(template, nnx.Param)
    flat = nnx.to_flat_state(state)
    values = [(path, leaf.replace(arrays[".".join(str(p) for p in path)])) for path, leaf in flat]
    return nnx.merge(graph, nnx.from_flat_state(values))


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    def schedule(peak: float) -> optax.Schedule:
        warmup = min(config.warmup, steps)
        after = {
            "constant": optax.constant_schedule(peak),
            "cosine": optax.cosine_decay_schedule(peak, max(steps - warmup, 1)),
        }[config.decay]
        return (
            optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])
            if warmup
            else after
        )

    # Gains, biases and modulation vectors are not decayed: decay is for matrices.
    decayed = lambda arrays: {path: path.endswith("kernel") for path in arrays}
    rate = schedule(config.learning_rate)
    if config.algorithm == "adamw":
        update = optax.adamw(rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=decayed)
    else:
        matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)  # [layers in out]
        update = optax.contrib.muon(
            schedule(config.muon_rate),
            weight_decay=config.weight_decay,
            adam_learning_rate=rate,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=lambda arrays: {
                path: matrix if path.startswith("blocks.") and path.endswith("kernel") else None
                for path in arrays
            },
        )
    return optax.chain(optax.clip_by_global_norm(config.clip), update)


def random_arrays(config: TrainConfig) -> Arrays:
    """Freshly initialised parameters."""
    return flatten(make_model(config, random_key(config.seed, 0, "init")))


def abstract_state(config: TrainConfig) -> TrainState:
    """The state's shapes and types; nothing is allocated."""
    return jax.eval_shape(lambda: init_state(config, random_arrays(config)))


def init_state(config: TrainConfig, arrays: Arrays) -> TrainState:
    """A fresh state around existing parameters."""
    trainable = {path: leaf for path, leaf in arrays.items() if trains(config.stage, path)}
    frozen = {path: leaf for path, leaf in arrays.items() if path not in trainable}
    optimizer = make_optimizer(config.optimizer, config.steps)
    if config.expert == "both":
        moments = {expert: optimizer.init(take_paths(trainable, expert)) for expert in EXPERTS}
    else:
        moments = optimizer.init(trainable)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        frozen=frozen,
        ema=jax.tree.map(jnp.copy, trainable),
        optimizer=moments,
    )


def take_paths(arrays: Arrays, expert: Expert) -> Arrays:
    """One expert's arrays, by the paths of a model of its own."""
    prefix = f"{expert}."
    return {path.removeprefix(prefix): leaf for path, leaf in arrays.items() if path.startswith(prefix)}


def put_paths(arrays: Arrays, expert: Expert) -> Arrays:
    """The inverse of `take_paths`."""
    return {f"{expert}.{path}": leaf for path, leaf in arrays.items()}


def take_expert(state: TrainState, expert: Expert) -> TrainState:
    """The part of a state of two experts that a step of one needs; also of a tree of shardings like it."""
    arrays = {name: take_paths(getattr(state, name), expert) for name in ("trainable", "frozen", "ema")}
    return TrainState(step=state.step, optimizer=state.optimizer[expert], **arrays)


def put_expert(state: TrainState, expert: Expert, part: TrainState) -> TrainState:
    """The state with one expert's part exchanged for what a step made of it."""
    arrays = {
        name: getattr(state, name) | put_paths(getattr(part, name), expert)
        for name in ("trainable", "frozen", "ema")
    }
    return TrainState(step=part.step, optimizer=state.optimizer | {expert: part.optimizer}, **arrays)
