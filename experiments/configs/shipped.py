"""The shipped world: the tiny one, larger and trained for hours. `experiments/quickstart.py --long` runs its stages.

python -m experiments.collect   --config=experiments/configs/shipped.py:collect
python -m experiments.collect   --config=experiments/configs/shipped.py:collect_long
python -m experiments.fit_codec --config=experiments/configs/shipped.py:codec
python -m experiments.train     --config=experiments/configs/shipped.py:world
python -m experiments.train     --config=experiments/configs/shipped.py:action
python -m experiments.evaluate  --config=experiments/configs/shipped.py:evaluate
"""

from ml_collections import ConfigDict

from experiments.configs import tiny
from experiments.configs.schema import EvaluateConfig, FitCodecConfig
from lingbot_jax.config import template
from lingbot_jax.engine.collect.config import CollectConfig
from lingbot_jax.training.config import TrainConfig

ROOT = "runs/shipped"
CHANNELS = 64
YAW = 3.0  # degrees per frame of a looking key

NETWORK = tiny.NETWORK | {
    "dim": 192,
    "layers": 6,
    "heads": 6,
    "ffn": 768,
    "latent_channels": CHANNELS,
    "text_len": 40,  # a place, people and two weathers
}

WORLD = tiny.WORLD | {
    "networks": {"world": NETWORK},
    "codec": {"kind": "conv", "channels": CHANNELS},
    "text": {"kind": "ngram", "dim": NETWORK["text_dim"], "length": NETWORK["text_len"]},
    "caption": "scene",  # what the weather has become by the end of the crop
}


def _collect() -> ConfigDict:
    fields = {
        "out": f"{ROOT}/data",
        "clips": 3000,
        "held_out": 96,
        "frames": 65,  # 4 s
        "yaw": YAW,
        "clips_per_map": 2,
        "weather_changes": 0.4,  # a crop of a second sees an eighth of them
    }
    return template(CollectConfig, fields)


def _collect_long() -> ConfigDict:
    """Held-out clips of 10 s, to measure what becomes of long play."""
    fields = {"out": f"{ROOT}/long", "seed": 1, "clips": 1, "held_out": 24, "frames": 161}
    return template(CollectConfig, fields | {"yaw": YAW, "clips_per_map": 1})


def _codec() -> ConfigDict:
    fields = {
        "out": f"{ROOT}/codec",
        "data": {"path": f"{ROOT}/data", "frames": 9, "batch": 8},
        "codec": {"kind": "conv", "channels": CHANNELS},
        "clips": 1500,
        "steps": 6000,
        "held_out": 96,
    }
    return template(FitCodecConfig, fields)


def _train(stage: str) -> ConfigDict:
    start = {} if stage == "world" else {"init": f"{ROOT}/world"}
    fields = {
        "run": f"{ROOT}/{stage}",
        "stage": stage,
        "steps": {"world": 12000, "action": 500}[stage],
        "codec": f"{ROOT}/codec",
        "world": WORLD,
        "data": {"path": f"{ROOT}/data", "frames": 17, "batch": 16},
        "tasks": {"continuation": 0.5, "max_conditioning_frames": 4},
        "flow": {"shift": 12.0},
        "optimizer": {
            "algorithm": "muon",
            "learning_rate": 2e-3,
            "warmup": 100,
            "decay": "cosine",
            "b2": 0.99,
            "ema": 0.998,
        },
        "checkpoint": {"every": 500},
    }
    return template(TrainConfig, start | fields)


def _evaluate() -> ConfigDict:
    return template(EvaluateConfig, {"run": f"{ROOT}/action", "out": f"{ROOT}/evaluation"})


def get_config(experiment: str = "world") -> ConfigDict:
    made = {
        "collect": _collect,
        "collect_long": _collect_long,
        "codec": _codec,
        "world": lambda: _train("world"),
        "action": lambda: _train("action"),
        "evaluate": _evaluate,
    }
    if experiment not in made:
        raise ValueError(f"shipped.py:{experiment}: unknown experiment; choose one of {', '.join(made)}")
    return made[experiment]()
