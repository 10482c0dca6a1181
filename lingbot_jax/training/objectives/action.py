"""Stage `action`: the loss of stage `world`, but only the action adapters train (paper section 3.3.2)."""

from lingbot_jax.models.control import is_adapter
from lingbot_jax.training.config import Stage


def trains(stage: Stage, path: str) -> bool:
    """Whether the parameter at a dotted path has a gradient and optimiser state in a stage."""
    return stage != "action" or is_adapter(tuple(path.split(".")), None)
