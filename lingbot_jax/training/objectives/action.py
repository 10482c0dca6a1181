"""Stage `action`: the loss of stage `world`, but only adapters train (paper section 3.3.2)."""

import dataclasses

from lingbot_jax.models.control import is_adapter
from lingbot_jax.training.objectives.world import WorldObjective


@dataclasses.dataclass(frozen=True)
class ActionObjective(WorldObjective):
    """Gradients and optimiser state of the camera and key adapters alone, and of low-rank ones if there are any."""

    def trains(self, network: str, path: str) -> bool:
        return is_adapter(path)
