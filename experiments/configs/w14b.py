"""LingBot-World at its published size: two A14B experts at 480p, trained on a TPU pod (docs/training.md).

    python -m experiments.train --config=experiments/configs/w14b.py:world  --distributed
    python -m experiments.train --config=experiments/configs/w14b.py:action --distributed

`world` trains the fundamental model from the converted image-to-video prior, without adapters, on clips of 5 to
60 seconds (paper section 3.3.1); `action` the adapters of the camera model alone (section 3.3.2). One job trains
one expert; the other with --config.expert=low --config.run=runs/w14b/world-low; one job trains the two with
--config.expert=both. Plan it before renting a pod:

    python -m experiments.plan --config=experiments/configs/w14b.py:world --topology=v5p:4x4x4
    python -m experiments.plan --config=experiments/configs/w14b.py:world --topology=v5p:8x8x8 \
        --config.data.frames=961

Both plan the fields below; with --phase=N, curriculum[N].
"""

import dataclasses

from ml_collections import ConfigDict

from lingbot_jax.config import template
from lingbot_jax.models.config import W14B
from lingbot_jax.training.config import TrainConfig

ROOT = "runs/w14b"
PRIOR = "bundles/wan2.2-i2v-a14b"  # of experiments.convert: transformers, VAE and text encoder


def _phase(until: int, frames: int, batch: int, shift: float, seq: int) -> dict:
    mesh = {"data": 1, "fsdp": -1, "seq": seq}
    return {"until": until, "frames": frames, "batch": batch, "shift": shift, "accumulate": 1, "mesh": mesh}


# Clips a process are for hosts of four chips. Every phase keeps about 32,000 tokens of a clip on a chip, until at
# a minute the eight devices that 40 heads and 1,560 tokens a frame divide over are used up.
CURRICULUM = {
    "world": (
        _phase(10000, frames=81, batch=4, shift=5.0, seq=1),
        _phase(15000, frames=161, batch=2, shift=6.0, seq=2),
        _phase(18000, frames=321, batch=1, shift=7.3, seq=4),
        _phase(20000, frames=961, batch=1, shift=10.0, seq=8),
    ),
    "action": (
        _phase(4000, frames=81, batch=4, shift=5.0, seq=1),
        _phase(5000, frames=321, batch=1, shift=7.3, seq=4),
    ),
}


def get_config(stage: str = "world") -> ConfigDict:
    if stage not in CURRICULUM:
        raise ValueError(f"w14b.py:{stage}: unknown stage; choose world or action")
    control = {"world": "none", "action": "cam"}[stage]
    return template(
        TrainConfig,
        {
            "run": f"{ROOT}/{stage}",
            "stage": stage,
            "steps": CURRICULUM[stage][-1]["until"],
            "expert": "high",
            "init": {"world": PRIOR, "action": f"{ROOT}/world"}[stage],
            "codec": PRIOR,
            "model": dataclasses.asdict(W14B) | {"control": control, "remat": "full"},
            "data": {"path": f"{ROOT}/data", "frames": 81, "batch": 1},
            "size": (480, 832),
            "tasks": {"caption": {"world": "narrative", "action": "static"}[stage]},
            # Of sampling; training shifts by phase.
            "flow": {"shift": 10.0},
            "optimizer": {
                "learning_rate": {"world": 1e-5, "action": 5e-5}[stage],
                "warmup": 500,
                "ema": 0.999,
            },
            "checkpoint": {"every": 250},
            # Eight devices share a sample's tokens (40 heads, 1,560 tokens a frame), all others its parameters.
            "mesh": {"fsdp": -1, "seq": 8},
            "curriculum": CURRICULUM[stage],
        },
    )
