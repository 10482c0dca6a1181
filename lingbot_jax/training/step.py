"""One training step: a pure function of (state, batch), made in one place from an objective.

A batch is prepared on the host, encoded on the mesh by a program of its own (`encode_program`) unless it was encoded
ahead of training (`unpack_program`), and a step (`make_step`) does the updates of an objective. All are `Program`s: run
them, or lower them with their abstract arguments, as plans do; what is planned is what runs.
"""

import dataclasses
import functools
from collections.abc import Callable
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
from lingbot_jax.training.networks import templates
from lingbot_jax.training.objectives import Constants, Mean, Metrics, Objective, Update
from lingbot_jax.training.state import (
    TrainState,
    abstract_state,
    learning_rate,
    make_optimizer,
    optimizer_of,
    random_key,
)
from lingbot_jax.worlds import clips
from lingbot_jax.worlds.clips import Clips, Encoded
from lingbot_jax.worlds.condition import Camera
from lingbot_jax.worlds.open import abstract_world
from lingbot_jax.worlds.world import Arrays


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


def unpack_program(config: TrainConfig, mesh: Mesh) -> Program:
    """Latents that were encoded ahead -> encoded clips: what `encode_program` is for clips; it encodes nothing."""
    fn = functools.partial(clips.unpack, stride=config.world.codec.stride[0])
    return Program(jax.jit(fn, out_shardings=sharding.batch_sharding(mesh)), (), mesh)


def make_step(
    objective: Objective,
    config: TrainConfig,
    mesh: Mesh,
    updates: tuple[Update, ...],
    encoded: Encoded | None = None,
) -> Program:
    """The program (state, clips, constants) -> (state, metrics) that does `updates`; the state is donated.

    It is given the part of the state that the updates read (`TrainState.part(networks_of(updates))`).

    Args:
      config: the run as the step's phase sees it. encoded: abstract clips; None: the program cannot be lowered
        without arguments.

    Raises:
      ConfigError: sizes that the mesh does not divide.
    """
    whole = abstract_state(config, mesh, objective.trains, update_counts(config, objective))
    state = whole.part(networks_of(updates))
    attend = Attend(kernel=attention_kernel(mesh, config.world.network.heads, config.mesh.ulysses))
    # Where the results go is where the arguments were: the state never moves.
    out = jax.tree.map(lambda leaf: leaf.sharding, state)
    fn = functools.partial(train_step, config, objective, updates, attend)
    args = () if encoded is None else (state, encoded, constants_spec(config, mesh))
    return Program(jax.jit(fn, donate_argnums=0, out_shardings=(out, None)), args, mesh)


def networks_of(updates: tuple[Update, ...]) -> tuple[str, ...]:
    """Networks that a step's updates need."""
    return tuple(dict.fromkeys(name for u in updates for name in (*u.networks, *u.reads)))


def update_counts(config: TrainConfig, objective: Objective) -> dict[str, int]:
    """How many updates each network of a run gets in it."""
    return {name: objective.update_count(name) for name in templates(config)}


def constants_spec(config: TrainConfig, mesh: Mesh) -> Constants:
    text = config.world.text
    whole = NamedSharding(mesh, PartitionSpec())
    null_text = jax.ShapeDtypeStruct((1, text.length, text.dim), jnp.float32, sharding=whole)
    return Constants(null_text, abstract_world(config.world, mesh).codec)


def train_step(
    config: TrainConfig,
    objective: Objective,
    updates: tuple[Update, ...],
    attend: Attend,
    state: TrainState,
    batch: Encoded,
    constants: Constants,
) -> tuple[TrainState, Metrics]:
    """The updates of one step, in order; each sees what the ones before it made."""
    key, metrics = random_key(config.seed, state.step, "loss"), {}
    for i, update in enumerate(updates):
        draw = jax.random.fold_in(key, i)
        state, found = _update(config, objective, update, attend, state, batch, constants, draw)
        metrics = found | metrics  # of several updates the first one's loss is the step's
        if len(templates(config)) > 1:
            metrics |= {f"{metric}_{update.networks[0]}": value for metric, value in found.items()}
    return dataclasses.replace(state, step=state.step + 1), metrics


def _update(
    config: TrainConfig,
    objective: Objective,
    update: Update,
    attend: Attend,
    state: TrainState,
    batch: Encoded,
    constants: Constants,
    key: jax.Array,
) -> tuple[TrainState, Metrics]:
    """One optimiser update of each network of an `Update`."""
    gradients = functools.partial(_gradients, config, objective, update, state, constants, attend)
    grads, metrics = _accumulated(gradients, batch, key, config.optimizer.grad_accum_steps)
    alone = lambda value: Mean(jnp.asarray(value, jnp.float32), jnp.float32(1))
    metrics |= {"grad_norm": alone(optax.tree.norm(grads))}
    part = TrainState(state.step, {}, {}, {})
    for name, grad in grads.items():
        own, count = optimizer_of(config, name), objective.update_count(name)
        before = {path: state.params[name][path] for path in grad}
        changes, opt = make_optimizer(own, count).update(grad, state.opt[name], before)
        after = optax.apply_updates(before, changes)
        part.params[name], part.opt[name] = state.params[name] | after, opt
        if name in state.ema:
            # The average starts short and lengthens, so that early checkpoints are not the initialisation.
            decay = jnp.minimum(own.ema, (1.0 + state.step) / (10.0 + state.step))
            mix = lambda e, p, decay=decay: decay * e + (1 - decay) * p
            part.ema[name] = jax.tree.map(mix, state.ema[name], after)
        rate = learning_rate(own, count)(_updates_done(state.opt[name]))
        metrics = {"learning_rate": alone(rate)} | metrics  # the first network's
    return state.updated(part), metrics


def _gradients(
    config: TrainConfig,
    objective: Objective,
    update: Update,
    state: TrainState,
    constants: Constants,
    attend: Attend,
    batch: Encoded,
    key: jax.Array,
) -> tuple[dict[str, Arrays], Metrics]:
    """Gradients of the parameters that train, by network, and metrics."""
    modules = templates(config)

    def loss(trained: dict[str, Arrays]) -> tuple[jax.Array, Metrics]:
        arrays = {name: state.params[name] | trained.get(name, {}) for name in networks_of((update,))}
        networks = {name: params.with_arrays(modules[name], tree) for name, tree in arrays.items()}
        return update.loss(networks, batch, constants, key, attend)

    trained = {
        name: {path: leaf for path, leaf in state.params[name].items() if objective.trains(name, path)}
        for name in update.networks
    }
    return jax.grad(loss, has_aux=True)(trained)


def _accumulated(
    gradients: Callable[[Encoded, jax.Array], tuple[dict[str, Arrays], Metrics]],
    batch: Encoded,
    key: jax.Array,
    parts: int,
) -> tuple[dict[str, Arrays], Metrics]:
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
