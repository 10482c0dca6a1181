"""LingBot-World 2.0 trained on, from its converted checkpoints (docs/lingbot2.md, where its licence is).

    python -m experiments.train --config=experiments/configs/lingbot2.py:action  --distributed
    python -m experiments.train --config=experiments/configs/lingbot2.py:causal  --distributed
    python -m experiments.train --config=experiments/configs/lingbot2.py:distill --distributed

`action` trains the camera adapters of the bidirectional 14B. `causal` goes on from the causal pretrain, whose past is
clean too, at the four levels of the fast model; `distill` makes of the result a player in four steps; its teacher is
the bidirectional 14B. `distill,1.3b` goes on with the fast 1.3B as published, under the same teacher. With
--config.lora.rank=32 low-rank adapters train in the place of a whole network.
"""

import dataclasses

from ml_collections import ConfigDict

from lingbot_jax.config import ConfigError, template
from lingbot_jax.convert.presets import PRESETS
from lingbot_jax.models.config import W1_3B, W14B
from lingbot_jax.training.config import TrainConfig

ROOT = "runs/lingbot2"
BUNDLES = "bundles/lingbot2-"
TEACHER = f"{BUNDLES}14b-bidirectional"
SIZES = {"14b": W14B, "1.3b": W1_3B}


def _phase(end_step: int, frames: int, batch: int, shift: float, seq: int) -> dict:
    mesh = {"data": 1, "fsdp": -1, "seq": seq}
    return {"end_step": end_step, "frames": frames, "batch": batch, "shift": shift, "mesh": mesh}


# For 64 chips. Latent frames of the causal stages are a multiple of the chunk, 4.
CURRICULUM = {
    "action": (_phase(4000, frames=81, batch=64, shift=5.0, seq=1),),
    "causal": (_phase(3000, frames=77, batch=64, shift=5.0, seq=4),),
    "distill": (
        _phase(3000, frames=77, batch=64, shift=5.0, seq=4),
        _phase(4000, frames=317, batch=64, shift=5.0, seq=4),
        _phase(5000, frames=957, batch=64, shift=5.0, seq=4),
    ),
}
STARTS = {
    ("action", "14b"): TEACHER,
    ("causal", "14b"): f"{BUNDLES}14b-causal-pretrain",
    ("distill", "14b"): f"{ROOT}/causal-14b",
    ("distill", "1.3b"): f"{BUNDLES}1.3b",
}


def get_config(argument: str = "causal") -> ConfigDict:
    stage, _, size = argument.partition(",")
    size = size or "14b"
    if (stage, size) not in STARTS:
        raise ConfigError(f"config = lingbot2.py:{argument}: choose action, causal, distill or distill,1.3b")
    network = lambda sizes: dataclasses.asdict(sizes) | {"control": "cam", "remat": "full"}
    preset = PRESETS[f"lingbot2-{size}" if stage != "action" else "lingbot2-14b-bidirectional"]
    plays = {name: part and dataclasses.asdict(part) for name, part in preset.items()}
    teacher = {"teacher": TEACHER, "teachers": {"world": network(W14B)}} if stage == "distill" else {}
    return template(
        TrainConfig,
        teacher
        | {
            "run": f"{ROOT}/{stage}-{size}",
            "stage": stage,
            "steps": CURRICULUM[stage][-1]["end_step"],
            "init": STARTS[stage, size],
            "codec": TEACHER,
            "world": {
                "networks": {"world": network(SIZES[size])},
                "codec": {"kind": "wan_vae"},
                "text": {"kind": "umt5"},
                **plays,
            },
            "data": {"path": f"{ROOT}/data", "frames": 81, "batch": 64},
            "size": (480, 832),
            "tasks": {"continuation": 0.3 if stage == "action" else 0.0},
            "forcing": {"method": "teacher_forcing"},
            "distill": {"shortest": 5, "window": 5, "gradient_chunks": 5},
            "optimizer": {
                "action": {"learning_rate": 5e-5, "warmup": 500},
                "causal": {"learning_rate": 1e-5, "warmup": 500},
                "distill": {"learning_rate": 2e-6, "warmup": 0, "b1": 0.0, "ema": 0.99},
            }[stage],
            "checkpoint": {"every": 250},
            "curriculum": CURRICULUM[stage],
        },
    )
