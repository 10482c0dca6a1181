"""Which steps are saved, by an injected clock; several processes: `tests/parallel/test_multihost`."""

import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.training.config import CheckpointConfig
from lingbot_jax.training.saving import Saving


def saved(start: int, *seconds: float, busy: tuple[int, ...] = (), **fields) -> list[int]:
    """The steps start + 1, ... that are saved if a run starts at second 0 and they end at these seconds."""
    now = 0.0
    saving, steps = Saving(CheckpointConfig(**fields), start, lambda: now), []
    for step, now in enumerate(seconds, start + 1):  # noqa: B007 - the clock reads it
        if saving.due(step, busy=step in busy):
            saving.done(step)
            steps.append(step)
    return steps


EVERY_40 = [40.0 * i for i in range(1, 10)]


def test_steps_and_minutes_both_save():
    assert saved(10, *EVERY_40, every=100, every_minutes=2.0) == [13, 16, 19], "the third step ends at 120 s"
    assert saved(10, *EVERY_40, every=4, every_minutes=None) == [12, 16]
    assert saved(10, *EVERY_40, every=4, every_minutes=2.0) == [12, 15, 16, 19], (
        "a save starts the minutes anew"
    )
    assert saved(10, *EVERY_40, every=100, every_minutes=100.0) == []


def test_a_new_run_saves_its_first_step():
    assert saved(0, *EVERY_40, every=100, every_minutes=2.0) == [1, 4, 7]
    assert saved(0, *EVERY_40, every=100, every_minutes=None) == []


def test_a_checkpoint_that_is_being_written_is_not_waited_for():
    assert saved(10, *EVERY_40, busy=(13, 14), every=100, every_minutes=2.0) == [15, 18]
    assert saved(10, *EVERY_40, busy=(12,), every=4, every_minutes=2.0) == [12, 15, 16, 19], (
        "but by steps it is"
    )


def test_minutes_are_positive():
    with pytest.raises(ConfigError, match="^every_minutes = 0: must be greater than 0"):
        CheckpointConfig(every_minutes=0)
