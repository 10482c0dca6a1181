"""The shipped world: the tiny one, larger and trained for hours. `experiments/quickstart.py --long` runs its stages.

python -m experiments.collect   --config=experiments/configs/shipped.py:collect
python -m experiments.collect   --config=experiments/configs/shipped.py:collect_long
python -m experiments.fit_codec --config=experiments/configs/shipped.py:codec
python -m experiments.train     --config=experiments/configs/shipped.py:world
python -m experiments.train     --config=experiments/configs/shipped.py:action
python -m experiments.train     --config=experiments/configs/shipped.py:causal
python -m experiments.train     --config=experiments/configs/shipped.py:distill
python -m experiments.evaluate  --config=experiments/configs/shipped.py:evaluate
python -m experiments.compare   --config=experiments/configs/shipped.py:compare
"""

from ml_collections import ConfigDict

from experiments.configs import tiny
from experiments.configs.schema import EvaluateConfig, FitCodecConfig
from lingbot_jax.config import template
from lingbot_jax.engine.collect.config import CollectConfig
from lingbot_jax.training.config import TrainConfig

ROOT = "runs/shipped"
CHANNELS = 64
YAW = tiny.YAW  # of the keys in the clips and of the world's

NETWORK = tiny.NETWORK | {
    "dim": 192,
    "layers": 5,
    "heads": 6,
    "ffn": 768,
    "latent_channels": CHANNELS,
    "text_len": 48,  # a place, people and two weathers
}

WORLD = tiny.WORLD | {
    "networks": {"world": NETWORK},
    "codec": {"kind": "conv", "channels": CHANNELS},
    "text": {"kind": "ngram", "dim": NETWORK["text_dim"], "length": NETWORK["text_len"]},
    # Each pose from the one before: however long one walks, what the network is told stays what it was trained on.
    "pose": {"reference": "previous", "translation": "metric"},
    "caption": "scene",  # what the weather has become by the end of the crop
}

# A key is answered in the next chunk, a quarter of a second; a second and a half and the first frame are seen.
CAUSAL = {
    "chunk": 1,
    "window": 7,
    "sink": 1,
    "schedule": "warped",
    "levels": (1000, 750, 500, 250),
    "shift": 3.0,
}
CAUSAL_WORLD = tiny.causal_world(WORLD, CAUSAL)


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


def _train(stage: str, steps: int, **fields: object) -> ConfigDict:
    run = {
        "run": f"{ROOT}/{stage}",
        "stage": stage,
        "steps": steps,
        "codec": f"{ROOT}/codec",
        "world": WORLD,
        "data": {"path": f"{ROOT}/data", "frames": 17, "batch": 16},
        "tasks": {"continuation": 0.5, "max_conditioning_frames": 4},
        "flow": {"shift": 12.0},
        "optimizer": {
            "algorithm": "muon",
            "learning_rate": 2e-3,
            "warmup": 100,
            "decay": "constant",  # more steps go on from here; the average stands in for a decayed rate
            "b2": 0.99,
            "ema": 0.998,
        },
        "checkpoint": {"every": 200},
    }
    return template(TrainConfig, run | fields)


def _causal() -> ConfigDict:
    """Of what a chunk sees in play: a clean past. Trained from the start, in place of the long way over `action`."""
    return _train(
        "causal",
        12000,
        world=CAUSAL_WORLD,
        data={"path": f"{ROOT}/data", "frames": 25, "batch": 6},
        tasks={"continuation": 0.0, "text_dropout": 0.0},
        forcing={"method": "teacher_forcing", "weighting": "velocity"},
    )


def _distill() -> ConfigDict:
    made = tiny.get_config("distill").to_dict()
    fields = {"steps": 2000, "distill": made["distill"], "optimizer": made["optimizer"] | {"ema": 0.99}}
    fields |= {"init": f"{ROOT}/causal", "teacher": f"{ROOT}/action", "world": CAUSAL_WORLD}
    data = {"path": f"{ROOT}/data", "frames": 33, "batch": 8}
    return _train("distill", data=data, tasks={"continuation": 0.0}, **fields)


def _evaluate() -> ConfigDict:
    return template(EvaluateConfig, {"run": f"{ROOT}/action", "out": f"{ROOT}/evaluation"})


def get_config(experiment: str = "world") -> ConfigDict:
    made = {
        "collect": _collect,
        "collect_long": _collect_long,
        "codec": _codec,
        "world": lambda: _train("world", 12000),
        "action": lambda: _train("action", 500, init=f"{ROOT}/world"),
        "causal": _causal,
        "distill": _distill,
        "compare": lambda: tiny.compare(ROOT, frames=161),
        "evaluate": _evaluate,
    }
    if experiment not in made:
        raise ValueError(f"shipped.py:{experiment}: unknown experiment; choose one of {', '.join(made)}")
    return made[experiment]()
