"""Which steps of a run are saved: by number, and by the time since the one before. Orbax's policies say so."""

import dataclasses
import datetime
import time
from collections.abc import Callable
from typing import Any

from orbax.checkpoint import checkpoint_managers as managers
from orbax.checkpoint import options

from lingbot_jax.training.config import CheckpointConfig

Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class _Saved:
    """What Orbax's policies know of a checkpoint."""

    step: int
    time: datetime.datetime
    metrics: dict[str, Any] | None = None


class Saving:
    """Every `config.every` steps, and once `config.every_minutes` have passed since the last save or the start.

    The same answer in every process: by time, process 0's clock decides, and the others read its answer from the
    coordinator. They do so while the step runs that was dispatched before, so no device waits. A time that comes
    while the checkpoint before is still being written is put off.

    Args:
      start: the step that was restored. 0: a new run, whose first step is due, so that a place that cannot be written
        is found at once, and how long saving takes is known.
      clock: seconds, of which differences count.
    """

    def __init__(self, config: CheckpointConfig, start: int, clock: Clock = time.monotonic):
        policies: list[managers.SaveDecisionPolicy] = [managers.FixedIntervalPolicy(config.every)]
        if config.every_minutes is not None:
            seconds = 60 * config.every_minutes
            policies.append(managers.ContinuousCheckpointingPolicy(minimum_interval_secs=seconds))
        self._policy, self._clock = managers.AnySavePolicy(policies), clock
        self._last = [self._saved(start)] if start else []

    def due(self, step: int, busy: bool) -> bool:
        """Whether to save `step`; all processes ask of the same steps.

        Args:
          busy: the checkpoint before is still being written.
        """
        context = managers.DecisionContext(
            is_saving_in_progress=busy,
            reached_preemption=False,  # of this the loop asks
            multiprocessing_options=options.MultiprocessingOptions(),
        )
        return self._policy.should_save(self._saved(step), previous_steps=self._last, context=context)

    def done(self, step: int) -> None:
        """`step` is being saved."""
        self._last = [self._saved(step)]

    def _saved(self, step: int) -> _Saved:
        return _Saved(step, datetime.datetime.fromtimestamp(self._clock(), datetime.UTC))
