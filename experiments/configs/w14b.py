"""One A14B expert at 480p, the published sizes: plan it for a pod before renting one.

    python -m experiments.plan --config=experiments/configs/w14b.py:world --topology=v5p:4x4x4
    python -m experiments.plan --config=experiments/configs/w14b.py:world --topology=v5p:8x8x8 \
        --config.data.frames=961

`world` trains the fundamental model (paper section 3.3.1), without adapters; `action` trains the adapters of
the published camera model (section 3.3.2).
"""

import dataclasses

from ml_collections import ConfigDict

from lingbot_jax.config import W14B, template
from lingbot_jax.training.config import TrainConfig

ROOT = "runs/w14b"


def get_config(stage: str = "world") -> ConfigDict:
    if stage not in ("world", "action"):
        raise ValueError(f"w14b.py:{stage}: unknown stage; choose world or action")
    control = {"world": "none", "action": "cam"}[stage]
    return template(
        TrainConfig,
        {
            "run": f"{ROOT}/{stage}",
            "stage": stage,
            "steps": 20000,
            "expert": "high",
            "codec": f"{ROOT}/codec.safetensors",
            "model": dataclasses.asdict(W14B) | {"control": control, "remat": "block"},
            "data": {"path": f"{ROOT}/data", "frames": 81, "batch": 1},
            # Eight devices share a sample's tokens (40 heads, 1,560 tokens a frame), all others its parameters.
            "mesh": {"fsdp": -1, "seq": 8},
        },
    )
