"""LingBot-World at its published size: two A14B experts at 480p, trained on a TPU pod (docs/training.md).

    python -m experiments.train --config=experiments/configs/w14b.py:world  --distributed
    python -m experiments.train --config=experiments/configs/w14b.py:action --distributed

`world` trains the fundamental model from the converted image-to-video prior, without adapters, on clips of 5 to
60 seconds (paper section 3.3.1); `action` the adapters of the camera model alone (section 3.3.2). One job trains
the high-noise expert, w14b.py:world,low the other, w14b.py:world,both the two in turn. Plan it before renting a pod:

    python -m experiments.plan --config=experiments/configs/w14b.py:world --topology=v5p:4x4x4
    python -m experiments.plan --config=experiments/configs/w14b.py:world --topology=v5p:8x8x8 --phase=3

Post-training (section 3.4) makes of the two experts one causal student of four steps. `causal` starts it as the
high-noise expert, `distill` learns from both, which are joined first:

    python -m experiments.convert --source=high=runs/w14b/action-high,low=runs/w14b/action-low --out=bundles/w14b
    python -m experiments.train --config=experiments/configs/w14b.py:causal  --distributed
    python -m experiments.train --config=experiments/configs/w14b.py:distill --distributed

`evaluate` measures the trained world. `encode` makes latents of the clips, crops of 81 frames, which a phase of as many
takes in their place (docs/data.md). `fast` is the causal student as it is played: what the plans of serving are of.

    python -m experiments.plan --config=experiments/configs/w14b.py:fast --topology=tpu7x:2x2x1 --program=chunk \\
        --weights=whole
"""

import dataclasses

from ml_collections import ConfigDict

from experiments.configs.schema import EncodeConfig, EvaluateConfig
from lingbot_jax.config import template
from lingbot_jax.models.config import W14B
from lingbot_jax.training.config import TrainConfig

ROOT = "runs/w14b"
PRIOR = (
    "bundles/wan2.2-i2v-a14b"  # of experiments.convert: transformers, VAE and text encoder (docs/convert.md)
)


def _phase(end_step: int, frames: int, batch: int, shift: float, seq: int) -> dict:
    mesh = {"data": 1, "fsdp": -1, "seq": seq}
    return {"end_step": end_step, "frames": frames, "batch": batch, "shift": shift, "mesh": mesh}


# For 64 chips. Every phase keeps about 32,000 tokens of a clip on a chip, until at a minute the eight devices that 40
# heads and 1,560 tokens per frame divide over are used up.
CURRICULUM = {
    "world": (
        _phase(10000, frames=81, batch=64, shift=5.0, seq=1),
        _phase(15000, frames=161, batch=32, shift=6.0, seq=2),
        _phase(18000, frames=321, batch=16, shift=7.3, seq=4),
        _phase(20000, frames=961, batch=8, shift=10.0, seq=8),
    ),
    "action": (
        _phase(4000, frames=81, batch=64, shift=5.0, seq=1),
        _phase(5000, frames=321, batch=16, shift=7.3, seq=4),
    ),
}
# Latent frames are a multiple of the chunk, 3. Rollouts reach the length of a clip: 5 seconds, 20, a minute.
POST_TRAINING = {
    "causal": (_phase(3000, frames=81, batch=64, shift=5.0, seq=1),),
    "distill": (
        _phase(3000, frames=81, batch=64, shift=5.0, seq=4),
        _phase(4000, frames=321, batch=64, shift=5.0, seq=4),
        _phase(5000, frames=957, batch=64, shift=5.0, seq=4),
    ),
}
TEACHER = "bundles/w14b"
_DATA = {"path": f"{ROOT}/data", "frames": 81, "batch": 64}
SIZE = (480, 832)
EXPERTS = {"high": ("high",), "low": ("low",), "both": ("high", "low")}


def get_config(argument: str = "world") -> ConfigDict:
    stage, _, expert = argument.partition(",")
    expert = expert or "high"
    if stage == "evaluate":
        return template(EvaluateConfig, {"run": f"{ROOT}/action-{expert}", "out": f"{ROOT}/evaluation"})
    if stage == "encode":
        data = _DATA | {"batch": 4}  # one crop per chip of a host
        fields = {"out": f"{ROOT}/latents", "data": data, "codec": PRIOR, "size": SIZE, "dtype": "float16"}
        return template(EncodeConfig, fields | {"captions": ("narrative", "static")})
    if stage in POST_TRAINING:
        return _post_training(stage)
    if stage == "fast":
        return _fast()
    if stage not in CURRICULUM or expert not in EXPERTS:
        raise ValueError(
            f"w14b.py:{argument}: choose encode, world, action, causal, distill, fast or evaluate; "
            "world,low and world,both as well"
        )
    control = {"world": "none", "action": "cam"}[stage]
    network = dataclasses.asdict(W14B) | {"control": control, "remat": "full"}
    return template(
        TrainConfig,
        {
            "run": f"{ROOT}/{stage}-{expert}",
            "stage": stage,
            "steps": CURRICULUM[stage][-1]["end_step"],
            "init": {"world": PRIOR, "action": f"{ROOT}/world-{expert}"}[stage],
            "codec": PRIOR,
            "world": {
                "networks": {name: network for name in EXPERTS[expert]},
                "codec": {"kind": "wan_vae"},
                "text": {"kind": "umt5"},
                "caption": {"world": "narrative", "action": "static"}[stage],
                "sample": {},
            },
            "data": _DATA,
            "size": SIZE,
            "optimizer": {
                "learning_rate": {"world": 1e-5, "action": 5e-5}[stage],
                "warmup": 500,
                "ema": 0.999,
            },
            "checkpoint": {"every": 250},
            "curriculum": CURRICULUM[stage],
        },
    )


def _fast() -> ConfigDict:
    config = _post_training("causal")
    with config.unlocked():
        config.update({"curriculum": (), "mesh": {"fsdp": 1, "seq": -1}})
        config.world.networks.world.remat = "none"
    return config


def _post_training(stage: str) -> ConfigDict:
    network = dataclasses.asdict(W14B) | {"control": "cam", "remat": "full"}
    start = {"init": TEACHER}
    if stage == "distill":
        start = {"init": f"{ROOT}/causal", "teacher": TEACHER, "teachers": {"high": network, "low": network}}
    return template(
        TrainConfig,
        start
        | {
            "run": f"{ROOT}/{stage}",
            "stage": stage,
            "steps": POST_TRAINING[stage][-1]["end_step"],
            "codec": PRIOR,
            "world": {
                "networks": {"world": network},
                "codec": {"kind": "wan_vae"},
                "text": {"kind": "umt5"},
                "causal": {},
            },
            "data": _DATA,
            "size": SIZE,
            "tasks": {"continuation": 0.0},
            "distill": {"head": {}},
            # Of the student; the fake scores and the head have a fifth of the rate (distill.critic_rate).
            "optimizer": {
                "causal": {"learning_rate": 1e-5, "warmup": 500, "ema": 0.999},
                "distill": {"learning_rate": 2e-6, "warmup": 0, "b1": 0.0, "ema": 0.99},
            }[stage],
            "checkpoint": {"every": 250},
            "curriculum": POST_TRAINING[stage],
        },
    )
