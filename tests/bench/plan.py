"""Proof that the w14b world step fits the pods we name, with the collectives we meant (docs/parallelism.md).

Each row compiles the real step for a topology; several minutes each.
"""

from collections.abc import Iterator

from experiments.configs.w14b import get_config
from experiments.plan import describe, plan
from lingbot_jax.config import build
from lingbot_jax.training.config import TrainConfig

CASES = (("v5p:4x4x4", 81), ("v6e:8x8", 81), ("v5p:8x8x8", 961))
MFU = {("v5p:4x4x4", 81): 0.45}


def check(report: dict, frames: int) -> None:
    """Raises AssertionError unless the step fits and communicates as intended."""
    assert report["fits"], "does not fit"
    assert report["gathered_activations"] == 0, "tokens are gathered over seq"
    held, devices = report["hbm_bytes_per_chip"], report["chips"]
    assert held["optimizer"] < 2.1 * held["parameters"], "optimiser state is replicated"
    assert held["parameters"] < 1.02 * 4 * 14.4e9 / devices, "parameters are replicated"
    assert report["mfu_without_overlap"] >= MFU.get((report["topology"], frames), 0.0)
    kinds = report["collective_bytes"]
    assert kinds["reduce-scatter"], "gradients are not scattered"
    assert sum(kinds["all-reduce"].values()) < 0.1 * sum(kinds["all-gather"].values()), (
        "gradients are summed whole"
    )


def run() -> Iterator[str]:
    for topology, frames in CASES:
        values = get_config("world").to_dict()
        values["data"]["frames"] = frames
        report = plan(build(TrainConfig, values), topology, 1, 480, 832, 1e11)
        yield describe(report)
        check(report, frames)
