"""One training step, a pure function of (state, batch)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lingbot_jax.models.attention import Attend
from lingbot_jax.models.dit import Condition
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.training.objectives.world import world_loss
from lingbot_jax.training.state import (
    TrainState,
    abstract_model,
    make_optimizer,
    merge,
    random_key,
)

Metrics = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Model inputs of a step: clean latents `b t h w c` and everything they are conditioned on."""

    latents: Float[Array, "b t h w c"]
    condition: Condition


def make_train_step(
    config: TrainConfig, attend: Attend
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step to be jitted with the state donated; under a mesh inside `sharding.use(mesh)`."""
    template = abstract_model(config)
    optimizer = make_optimizer(config.optimizer, config.steps)
    accumulate = config.optimizer.accumulate
    region = config.flow.region(config.expert)

    def loss(trainable, frozen, batch, key):
        model = merge(template, trainable | frozen)
        return world_loss(
            model,
            batch.latents,
            batch.condition,
            key,
            flow=config.flow,
            tasks=config.tasks,
            region=region,
            attend=attend,
        )

    gradient = jax.grad(loss, has_aux=True)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = random_key(config.seed, state.step, "loss")

        if accumulate == 1:
            grads, metrics = gradient(state.trainable, state.frozen, batch, key)
        else:

            def micro(total, inputs):
                part, i = inputs
                out = gradient(state.trainable, state.frozen, part, jax.random.fold_in(key, i))
                return jax.tree.map(lambda t, o: t + o / accumulate, total, out), None

            # Every device splits its own samples: the leading axis of a batch is sharded.
            parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
            zero = jax.eval_shape(
                gradient, state.trainable, state.frozen, jax.tree.map(lambda x: x[0], parts), key
            )
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zero)
            (grads, metrics), _ = jax.lax.scan(micro, zero, (parts, jnp.arange(accumulate)))

        updates, opt_state = optimizer.update(grads, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        # The average starts short and lengthens, so that early checkpoints are not the initialisation.
        decay = jnp.minimum(config.optimizer.ema, (1.0 + state.step) / (10.0 + state.step))
        new = TrainState(
            step=state.step + 1,
            trainable=trainable,
            frozen=state.frozen,
            ema=jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, trainable),
            optimizer=opt_state,
        )
        return new, metrics | {"grad_norm": optax.global_norm(grads)}

    return train_step
