"""One training step: a pure function of (state, batch), made in one place from an objective.

A batch is prepared on the host, encoded on the mesh by a program of its own (`encode_program`), and a step
(`make_step`) does the updates of an objective. Both are `Program`s: run them, or lower them with their abstract
arguments, as plans do; what is planned is what runs.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lingbot_jax.models import params
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.config import NgramConfig
from lingbot_jax.models.text import TextTokens
from lingbot_jax.parallel import sharding
from lingbot_jax.parallel.sequence import attention_kernel
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.training.objectives import Mean, Metrics, Objective, Update
from lingbot_jax.training.state import TrainState, abstract_state, learning_rate, make_optimizer, random_key
from lingbot_jax.worlds import clips
from lingbot_jax.worlds.clips import Clips, Encoded
from lingbot_jax.worlds.condition import Camera
from lingbot_jax.worlds.open import abstract_world
from lingbot_jax.worlds.world import Arrays, template


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function, its abstract arguments with their shardings, and the mesh it is traced under."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    mesh: Mesh

    def __call__(self, *args: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return self.fn(*args)

    def lower(self) -> jax.stages.Lowered:
        with jax.set_mesh(self.mesh):
            return self.fn.lower(*self.args)


def batch_specs(config: TrainConfig, mesh: Mesh) -> Clips:
    """Shapes of a step's prepared clips, sharded over the batch. `config` is of one phase, with a size."""
    world, frames = config.world, config.data.frames
    t = world.codec.latent_frames(frames)
    placed = sharding.batch_sharding(mesh)
    make = lambda shape, dtype: jax.ShapeDtypeStruct((config.data.batch, *shape), dtype, sharding=placed)
    text, ngram = world.text, isinstance(world.text, NgramConfig)
    several = () if config.intervals is None else (config.intervals,)
    length = (*several, text.length)
    values = make((*length, text.dim), jnp.float32) if ngram else make(length, jnp.int32)
    return Clips(
        frames=make((frames, *config.size, 3), jnp.uint8),
        camera=Camera(make((t, 4, 4), jnp.float32), make((1, 4), jnp.float32), make((t, 4), jnp.float32)),
        tokens=TextTokens(values, make(length, jnp.bool)),
        known=make((), jnp.int32),
    )


def encode_program(config: TrainConfig, mesh: Mesh) -> Program:
    """(codec, text encoder, clips) -> encoded clips, samples over data x fsdp."""
    placed = sharding.batch_sharding(mesh)
    world = abstract_world(config.world, mesh)
    fn = jax.jit(clips.encode, out_shardings=placed)
    args = (world.codec, world.text, batch_specs(config, mesh)) if config.size != (0, 0) else ()
    return Program(fn, args, mesh)


def make_step(
    objective: Objective,
    config: TrainConfig,
    mesh: Mesh,
    updates: tuple[Update, ...],
    encoded: Encoded | None = None,
) -> Program:
    """The program (state, clips, null text) -> (state, metrics) that does `updates`; the state is donated.

    It is given the part of the state that the updates read (`TrainState.part(networks_of(updates))`).

    Args:
      config: the run as the step's phase sees it. encoded: abstract clips; None: the program cannot be lowered
        without arguments.

    Raises:
      ConfigError: sizes that the mesh does not divide.
    """
    counts = {name: objective.update_count(name) for name in config.world.networks}
    whole = abstract_state(config, mesh, objective.trains, counts)
    state = whole.part(networks_of(updates))
    attend = Attend(kernel=attention_kernel(mesh, config.world.network.heads, config.mesh.ulysses))
    # Where the results go is where the arguments were: the state never moves.
    out = jax.tree.map(lambda leaf: leaf.sharding, state)
    fn = functools.partial(train_step, config, counts, updates, attend)
    args = () if encoded is None else (state, encoded, null_spec(config, mesh))
    return Program(jax.jit(fn, donate_argnums=0, out_shardings=(out, None)), args, mesh)


def networks_of(updates: tuple[Update, ...]) -> tuple[str, ...]:
    """Networks that a step's updates need."""
    return tuple(dict.fromkeys(name for u in updates for name in (u.network, *u.reads)))


def null_spec(config: TrainConfig, mesh: Mesh) -> jax.ShapeDtypeStruct:
    text = config.world.text
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct((1, text.length, text.dim), jnp.float32, sharding=whole)


def train_step(
    config: TrainConfig,
    counts: Mapping[str, int],
    updates: tuple[Update, ...],
    attend: Attend,
    state: TrainState,
    batch: Encoded,
    null_text: jax.Array,
) -> tuple[TrainState, Metrics]:
    """The updates of one step, in order; each sees what the ones before it made."""
    key, metrics = random_key(config.seed, state.step, "loss"), {}
    for i, update in enumerate(updates):
        draw = jax.random.fold_in(key, i)
        state, found = _update(config, counts[update.network], update, attend, state, batch, null_text, draw)
        metrics = found | metrics  # of several updates the first one's loss is the step's
        if len(counts) > 1:
            metrics |= {f"{metric}_{update.network}": value for metric, value in found.items()}
    return dataclasses.replace(state, step=state.step + 1), metrics


def _update(
    config: TrainConfig,
    count: int,
    update: Update,
    attend: Attend,
    state: TrainState,
    batch: Encoded,
    null_text: jax.Array,
    key: jax.Array,
) -> tuple[TrainState, Metrics]:
    """One optimiser update of one network, which gets `count` of them in the run."""
    name, parts = update.network, config.optimizer.grad_accum_steps
    gradients = functools.partial(_gradients, config, update, state, null_text, attend)
    grads, metrics = _accumulated(gradients, batch, key, parts)
    trained = {path: state.params[name][path] for path in grads}
    changes, opt = make_optimizer(config.optimizer, count).update(grads, state.opt[name], trained)
    trained = optax.apply_updates(trained, changes)
    # The average starts short and lengthens, so that early checkpoints are not the initialisation.
    decay = jnp.minimum(config.optimizer.ema, (1.0 + state.step) / (10.0 + state.step))
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema[name], trained)
    rate = learning_rate(config.optimizer, count)(_updates_done(state.opt[name]))
    alone = lambda value: Mean(jnp.asarray(value, jnp.float32), jnp.float32(1))
    metrics |= {"grad_norm": alone(optax.tree.norm(grads)), "learning_rate": alone(rate)}
    part = TrainState(state.step, {name: state.params[name] | trained}, {name: ema}, {name: opt})
    return state.updated(part), metrics


def _gradients(
    config: TrainConfig,
    update: Update,
    state: TrainState,
    null_text: jax.Array,
    attend: Attend,
    batch: Encoded,
    key: jax.Array,
) -> tuple[Arrays, Metrics]:
    """Gradients of the parameters that train, and metrics."""

    def model(name: str, changed: Mapping[str, jax.Array]) -> Any:
        return params.with_arrays(template(config.world.networks[name]), {**state.params[name], **changed})

    def loss(trained: Arrays) -> tuple[jax.Array, Metrics]:
        networks = {name: model(name, {}) for name in update.reads} | {
            update.network: model(update.network, trained)
        }
        return update.loss(networks, batch, null_text, key, attend)

    own = update.network
    return jax.grad(loss, has_aux=True)({path: state.params[own][path] for path in state.ema[own]})


def _accumulated(
    gradients: Callable[[Encoded, jax.Array], tuple[Arrays, Metrics]],
    batch: Encoded,
    key: jax.Array,
    parts: int,
) -> tuple[Arrays, Metrics]:
    """Mean gradient and summed metrics over the parts of a batch, computed one after the other."""
    if parts == 1:
        return gradients(batch, key)
    # Every device splits its own samples: the leading axis of a batch is sharded.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def micro(total, inputs):
        part, i = inputs
        grads, metrics = gradients(part, jax.random.fold_in(key, i))
        grads = jax.tree.map(lambda g: g / parts, grads)
        return jax.tree.map(jnp.add, total, (grads, metrics)), None

    zero = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], split), key)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zero)
    return jax.lax.scan(micro, zero, (split, jnp.arange(parts)))[0]


def _updates_done(opt: optax.OptState) -> jax.Array:
    """How many updates an optimiser has made."""
    return optax.tree.get_all_with_path(opt, "count")[0][1]
