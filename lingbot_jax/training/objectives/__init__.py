"""What a stage trains, and by which losses: `Objective`. The loop and the step know no stage.

A loss decides its masks and noise levels itself. Two time scales (a critic and a generator) are two updates.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Float, PRNGKeyArray

from lingbot_jax.models.attention import Attend
from lingbot_jax.models.codec import Codec
from lingbot_jax.worlds.clips import Encoded


class Mean(NamedTuple):
    """A metric as what it is the mean of: sums and counts add up over microsteps, steps and processes."""

    sum: Float[Array, ""]
    count: Float[Array, ""]


class Constants(NamedTuple):
    """What no step changes.

    Attributes:
      null_text: tokens of no text. codec: video <-> latents.
    """

    null_text: Float[Array, "1 l d"]
    codec: Codec


Metrics = dict[str, Mean]
Networks = Mapping[str, Any]  # by name: WorldDiT, or the head
# (networks, clips, constants, key, attention) -> loss, metrics
Loss = Callable[[Networks, Encoded, Constants, PRNGKeyArray, Attend], tuple[Float[Array, ""], Metrics]]


class Update(NamedTuple):
    """One optimiser update within a step.

    Attributes:
      networks: that are updated, each by its own optimiser. loss: what is minimised. reads: other networks that the
        loss evaluates.
    """

    networks: tuple[str, ...]
    loss: Loss
    reads: tuple[str, ...] = ()


class Objective(Protocol):
    """A stage."""

    def trains(self, network: str, path: str) -> bool:
        """Whether the parameter at a dotted path has a gradient and optimiser state."""
        ...

    def updates(self, step: int) -> tuple[Update, ...]:
        """The updates of a step, in order. Steps of the same networks have the same losses: one compiled program."""
        ...

    def update_count(self, network: str) -> int:
        """How many updates a network gets in the whole run: what its learning rate is scheduled over."""
        ...
