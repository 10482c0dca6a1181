"""What a run says of itself."""

import pytest

from lingbot_jax.training.report import grace_warning


@pytest.mark.parametrize(
    ("step", "save", "warns"), [(156.0, 40.0, True), (10.0, 9.9, False), (10.0, 10.1, True)]
)
def test_a_run_that_cannot_save_within_the_grace_period_is_named(step, save, warns):
    """Two steps may be in flight."""
    said = grace_warning(step, save, 30.0)
    assert bool(said) == warns
    assert not warns or f"two steps of {step:.1f} s and a checkpoint of {save:.1f} s" in said
