"""What a run says of itself."""

import math
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.training import goodput, report
from lingbot_jax.training.goodput import Goodput
from lingbot_jax.training.metrics import read_metrics
from lingbot_jax.training.report import Clock, Report, grace_warning
from tests.training import micro


@pytest.mark.parametrize(
    ("step", "save", "warns"), [(156.0, 40.0, True), (10.0, 9.9, False), (10.0, 10.1, True)]
)
def test_a_run_that_cannot_save_within_the_grace_period_is_named(step, save, warns):
    """Two steps may be in flight."""
    said = grace_warning(step, save, 30.0)
    assert bool(said) == warns
    assert not warns or f"two steps of {step:.1f} s and a checkpoint of {save:.1f} s" in said


def test_wall_time_is_in_steps_or_lost_to_a_cause():
    """A wait for clips costs what no step hides: nothing while one runs, its end where one ended, or all of it."""
    now = 0.0
    spent = Goodput(lambda: now)
    now = 10.0
    spent.restored()
    parts = [("compile", 20.0, None), ("step", 20.0, None), ("data", 10.0, 54.0), ("data", 2.0, math.inf)]
    parts += [("data", 3.0, -math.inf), ("checkpoint", 10.0, None), ("evaluation", 5.0, None)]
    for cause, seconds, until in parts:
        with spent.on(cause, None if until is None else lambda until=until: until):
            now += seconds
    now = 100.0
    shares = spent.shares()
    lost = {"restore": 0.1, "compile": 0.2, "data": 0.09, "checkpoint": 0.1, "evaluation": 0.05, "other": 0.2}
    assert shares == pytest.approx(
        {"goodput": 0.26} | {f"lost_{cause}": share for cause, share in lost.items()}
    )
    assert spent.line().startswith("goodput 26.0 % of 100 s; lost to compile 20.0 %, other 20.0 %, ")


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    assert goodput.device_memory() == {}, "this backend does not say"
    used = [(3e9, 5e9), (4e9, 4.5e9)]
    stats = [{"bytes_in_use": now, "peak_bytes_in_use": most} for now, most in used]
    devices = [types.SimpleNamespace(memory_stats=lambda s=s: s) for s in (*stats, None)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert goodput.device_memory() == {"memory_gb": 4.0, "memory_peak_gb": 5.0}
    assert Goodput().line().endswith("; device memory at most 5.0 GB")


def test_the_end_of_a_dispatched_step_is_known(monkeypatch):
    go, ready = threading.Event(), report._when_ready
    monkeypatch.setattr(report, "_when_ready", lambda values: go.wait(60) and ready(values))
    said = Report(micro.config(micro.ROOT, "unused"), None, None, Goodput())
    assert said.busy_until() == -math.inf, "nothing was dispatched"
    said.later(1, {"loss": jnp.ones(())}, np.array(["shard:0:0"]), Clock(False))
    assert said.busy_until() == math.inf
    go.set()
    said._ended.exception(60)
    assert math.isfinite(said.busy_until())


def test_every_line_says_where_the_time_went(whole):
    lines = read_metrics(whole.run)
    names = {"goodput", "lost_other", *(f"lost_{cause}" for cause in goodput.LOST)}
    for line in lines:
        shares = {name: line[name] for name in names}
        assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > -1e-9
    assert lines[-1]["lost_checkpoint"] > 0 < lines[0]["lost_restore"], (
        "saved every four steps, after a start"
    )
    kept = [line["step"] for line in lines if line["goodput"] > 0]
    assert kept and lines[0]["lost_compile"] > lines[0]["goodput"], "the first step is its program's first"
