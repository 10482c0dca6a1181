"""Training of the networks of a codec (`models/conv_codec.py`): minutes on a CPU, one device, nothing to resume."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PRNGKeyArray, UInt8
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lingbot_jax.models import params
from lingbot_jax.models.codec import to_float
from lingbot_jax.models.conv_codec import LINEAR, ConvCodec, reconstruction_loss

_WARMUP = 20  # steps
_ADAM_SHARE = 0.1  # of Muon's rate, for what is no matrix inside the networks
_SHOWN = 20  # steps that the loss shown is averaged over


def train_codec(
    codec: ConvCodec,
    batches: Iterator[UInt8[np.ndarray, "b f H W 3"]],
    steps: int,
    rate: float,
    noise: float,
    seed: int,
) -> ConvCodec:
    """Trains what is not linear: Muon for the kernels, Adam for the rest; the rate falls to zero as a cosine.

    Args:
      batches: the frames of each step. rate: of Muon. noise: see `reconstruction_loss`.
    """
    trained = params.arrays_of(codec)
    fixed = {name: trained.pop(name) for name in LINEAR}
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, min(_WARMUP, steps // 4), steps)
    optimizer = optax.contrib.muon(
        schedule,
        adam_learning_rate=lambda count: _ADAM_SHARE * schedule(count),
        adam_b2=0.99,
        weight_decay=0.0,
        muon_weight_dimension_numbers={name: _matrix(name, array) for name, array in trained.items()},
    )

    @jax.jit
    def update(fixed: dict, trained: dict, state: optax.OptState, frames: jax.Array, key: PRNGKeyArray):
        def loss(trained: dict) -> jax.Array:
            return reconstruction_loss(
                params.with_arrays(codec, trained | fixed), to_float(frames), key, noise
            )

        value, gradients = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, value

    state, average = optimizer.init(trained), None
    columns = (
        TextColumn("codec"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("steps", total=steps, loss=float("nan"))
        for step in range(steps):
            key = jax.random.fold_in(jax.random.key(seed), step)
            trained, state, value = update(fixed, trained, state, jnp.asarray(next(batches)), key)
            average = value if average is None else average + (value - average) / _SHOWN
            progress.update(bar, advance=1, loss=float(average))
    return params.with_arrays(codec, trained | fixed)


def _matrix(name: str, array: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
    """How a kernel `... i o` is a matrix; None for Adam: biases, scales and the last kernel, as usual with Muon."""
    if array.ndim < 2 or not name.endswith("kernel") or name.startswith("outputs"):
        return None
    return optax.contrib.MuonDimensionNumbers(tuple(range(array.ndim - 1)), array.ndim - 1)
