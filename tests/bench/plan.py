"""Proof that the w14b world step fits the pods we name, and sends what it should (docs/parallelism.md).

Each row compiles the real step for a topology, minutes each; the first that breaks a promise ends the bench.
"""

import sys
import time
from collections.abc import Iterator

from experiments.configs.w14b import get_config
from lingbot_jax.config import build
from lingbot_jax.planning.estimate import Plan, plan_train
from lingbot_jax.planning.programs import Where, case
from lingbot_jax.planning.report import describe
from lingbot_jax.training.config import TrainConfig

# (topology, video frames, clips per step) and the least MFU, with everything but the longest term hidden.
CASES = {("v5p:4x4x4", 81, 8): 0.45, ("v5p:8x8x8", 961, 64): 0.0, ("v6e:8x8", 81, 8): 0.0}


def check(plan: Plan, mfu: float) -> None:
    """Raises AssertionError unless the step fits, is fast enough and sends and holds what it should."""
    name = plan.topology
    assert plan.fits, f"{name}: does not fit"
    assert plan.faults == [], f"{name}: {plan.faults}"
    # No fault is no proof where nothing was counted: the weights of 14B must be among what is sent and held.
    for kind in ("all-gather", "reduce-scatter"):
        sent = sum(plan.collective_bytes[kind].values())
        meant = sum(plan.collective_bytes_intended[kind].values())
        assert sent > 0.9 * meant, f"{name}: {kind} of {sent} bytes, meant are {meant}"
    assert plan.collective_bytes["all-to-all"]["seq"] > 0, f"{name}: no all-to-all over seq"
    held = plan.hbm_bytes_per_chip  # 14.3e9 parameters in float32; vectors of 2 MB per moment may be whole
    assert held["optimizer"] < 1.07 * 2 * 4 * 14.3e9 / plan.chips, f"{name}: {held}"
    assert plan.mfu >= mfu, f"{name}: MFU {plan.mfu:.1%}, at least {mfu:.0%} is promised"


def run() -> Iterator[str]:
    for i, ((topology, frames, batch), mfu) in enumerate(CASES.items()):
        print(f"{i + 1}/{len(CASES)}: {frames} frames on {topology}", file=sys.stderr, flush=True)
        values, start = get_config("world").to_dict(), time.monotonic()
        values |= {"curriculum": (), "mesh": {"fsdp": -1, "seq": 8}}
        values["data"] |= {"frames": frames, "batch": batch}
        plan = plan_train(case(build(TrainConfig, values), Where(topology)))
        yield f"{frames} frames, {describe(plan)}\n  compiled in {time.monotonic() - start:.0f} s"
        check(plan, mfu)
