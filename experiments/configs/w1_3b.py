"""A world of 1.3B parameters at 480p, one network: a research size for one pod slice (docs/training.md).

    python -m experiments.train --config=experiments/configs/w1_3b.py:world  --distributed
    python -m experiments.train --config=experiments/configs/w1_3b.py:action --distributed
    python -m experiments.plan  --config=experiments/configs/w1_3b.py:world  --topology=v5e:4x4

`world` starts from a random initialisation unless --config.init names a converted bundle; the VAE and the text
encoder are those of a bundle in either case. `evaluate` measures the trained world. `fast` is a causal student of this
size as LingBot-World 2.0 has it, chunks of 16 frames, for the plans of serving.
"""

import dataclasses

from ml_collections import ConfigDict

from experiments.configs.schema import EvaluateConfig
from lingbot_jax.config import template
from lingbot_jax.models.config import W1_3B
from lingbot_jax.training.config import TrainConfig

ROOT = "runs/w1_3b"


def _phase(end_step: int, frames: int, batch: int, shift: float, seq: int) -> dict:
    mesh = {"data": 1, "fsdp": -1, "seq": seq}
    return {"end_step": end_step, "frames": frames, "batch": batch, "shift": shift, "mesh": mesh}


# Clips per step of a slice of 16 chips; twelve heads divide over four devices.
CURRICULUM = {
    "world": (
        _phase(60000, frames=81, batch=16, shift=5.0, seq=1),
        _phase(80000, frames=161, batch=8, shift=6.0, seq=2),
        _phase(100000, frames=321, batch=4, shift=7.3, seq=4),
    ),
    "action": (_phase(5000, frames=81, batch=16, shift=5.0, seq=1),),
}


def get_config(stage: str = "world") -> ConfigDict:
    if stage == "evaluate":
        return template(EvaluateConfig, {"run": f"{ROOT}/action", "out": f"{ROOT}/evaluation"})
    if stage == "fast":
        return _fast()
    if stage not in CURRICULUM:
        raise ValueError(f"w1_3b.py:{stage}: unknown stage; choose world, action, fast or evaluate")
    start = {} if stage == "world" else {"init": f"{ROOT}/world"}
    control = {"world": "none", "action": "cam_act"}[stage]
    return template(
        TrainConfig,
        start
        | {
            "run": f"{ROOT}/{stage}",
            "stage": stage,
            "steps": CURRICULUM[stage][-1]["end_step"],
            "codec": "bundles/wan2.2-i2v-a14b",
            "world": {
                "networks": {"world": dataclasses.asdict(W1_3B) | {"control": control, "remat": "full"}},
                "codec": {"kind": "wan_vae"},
                "text": {"kind": "umt5"},
                "caption": {"world": "narrative", "action": "static"}[stage],
                "sample": {"shift": CURRICULUM[stage][-1]["shift"]},
            },
            "data": {"path": f"{ROOT}/data", "frames": 81, "batch": 16},
            "size": (480, 832),
            "optimizer": {"learning_rate": 1e-4, "warmup": 1000, "decay": "cosine"},
            "checkpoint": {"every": 500},
            "curriculum": CURRICULUM[stage],
        },
    )


def _fast() -> ConfigDict:
    return template(
        TrainConfig,
        {
            "run": f"{ROOT}/causal",
            "stage": "causal",
            "steps": 3000,
            "init": f"{ROOT}/action",
            "codec": "bundles/wan2.2-i2v-a14b",
            "world": {
                "networks": {"world": dataclasses.asdict(W1_3B) | {"control": "cam"}},
                "codec": {"kind": "wan_vae"},
                "text": {"kind": "umt5"},
                "causal": {"chunk": 4, "levels": (0, 250, 500, 750)},
            },
            # Latent frames of a clip are a multiple of the chunk.
            "data": {"path": f"{ROOT}/data", "frames": 77, "batch": 16},
            "size": (480, 832),
            "tasks": {"continuation": 0.0},
            "mesh": {"fsdp": 1, "seq": -1},
        },
    )
