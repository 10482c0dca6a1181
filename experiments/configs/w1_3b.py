"""A world of 1.3B parameters at 480p, one expert: a research size for one pod slice (docs/training.md).

    python -m experiments.train --config=experiments/configs/w1_3b.py:world  --distributed
    python -m experiments.train --config=experiments/configs/w1_3b.py:action --distributed
    python -m experiments.plan  --config=experiments/configs/w1_3b.py:world  --topology=v5e:4x4

`world` starts from a random initialisation unless --config.init names a converted bundle; the VAE and the text
encoder are those of a bundle in either case.
"""

import dataclasses

from ml_collections import ConfigDict

from lingbot_jax.config import template
from lingbot_jax.models.config import W1_3B
from lingbot_jax.training.config import TrainConfig

ROOT = "runs/w1_3b"


def _phase(until: int, frames: int, batch: int, shift: float, seq: int) -> dict:
    mesh = {"data": 1, "fsdp": -1, "seq": seq}
    return {"until": until, "frames": frames, "batch": batch, "shift": shift, "accumulate": 1, "mesh": mesh}


# Clips a process, for hosts of four chips; twelve heads divide over four devices.
CURRICULUM = {
    "world": (
        _phase(60000, frames=81, batch=4, shift=5.0, seq=1),
        _phase(80000, frames=161, batch=2, shift=6.0, seq=2),
        _phase(100000, frames=321, batch=1, shift=7.3, seq=4),
    ),
    "action": (_phase(5000, frames=81, batch=4, shift=5.0, seq=1),),
}


def get_config(stage: str = "world") -> ConfigDict:
    if stage not in CURRICULUM:
        raise ValueError(f"w1_3b.py:{stage}: unknown stage; choose world or action")
    start = {} if stage == "world" else {"init": f"{ROOT}/world"}
    return template(
        TrainConfig,
        start
        | {
            "run": f"{ROOT}/{stage}",
            "stage": stage,
            "steps": CURRICULUM[stage][-1]["until"],
            "codec": "bundles/wan2.2-i2v-a14b",
            "model": dataclasses.asdict(W1_3B)
            | {"control": {"world": "none", "action": "cam_act"}[stage], "remat": "full"},
            "data": {"path": f"{ROOT}/data", "frames": 81, "batch": 1},
            "size": (480, 832),
            "tasks": {"caption": {"world": "narrative", "action": "static"}[stage]},
            # Of sampling; training shifts by phase.
            "flow": {"shift": CURRICULUM[stage][-1]["shift"]},
            "optimizer": {"learning_rate": 1e-4, "warmup": 1000, "decay": "cosine"},
            "checkpoint": {"every": 500},
            "mesh": {"fsdp": -1, "seq": 4},  # twelve heads
            "curriculum": CURRICULUM[stage],
        },
    )
