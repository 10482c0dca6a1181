"""The tiny world: trains on a laptop CPU in minutes, on generated places or (--config.source=vizdoom) on a game.

One argument names the experiment; `make demo` runs collect, codec, world, action and evaluate in this order,
under runs/demo. `causal` makes of the action world one that is played chunk after chunk, `distill` lets it learn
from its own rollouts. `encode` is optional: it makes latents of the clips, which training takes in their place:

    python -m experiments.collect   --config=experiments/configs/tiny.py:collect
    python -m experiments.fit_codec --config=experiments/configs/tiny.py:codec
    python -m experiments.encode    --config=experiments/configs/tiny.py:encode
    python -m experiments.train     --config=experiments/configs/tiny.py:world
    python -m experiments.train     --config=experiments/configs/tiny.py:action
    python -m experiments.evaluate  --config=experiments/configs/tiny.py:evaluate
    python -m experiments.train     --config=experiments/configs/tiny.py:causal
    python -m experiments.train     --config=experiments/configs/tiny.py:distill
    python -m experiments.collect   --config=experiments/configs/tiny.py:collect_long
    python -m experiments.compare   --config=experiments/configs/tiny.py:compare
"""

from ml_collections import ConfigDict

from experiments.configs.schema import CompareConfig, EncodeConfig, EvaluateConfig, FitCodecConfig
from lingbot_jax.config import template
from lingbot_jax.engine.collect.config import CollectConfig
from lingbot_jax.training.config import TrainConfig

ROOT = "runs/demo"
CHANNELS = 48
YAW = 3.0  # degrees per frame of a turning key

CODEC = {"kind": "conv", "channels": CHANNELS}

NETWORK = {
    "dim": 128,
    "layers": 4,
    "heads": 4,
    "ffn": 512,
    "freq_dim": 64,
    "text_dim": 64,
    "text_len": 32,
    "latent_channels": CHANNELS,
    "control": "cam_act",
    # A token is one latent pixel: shifting the first frame is then a matter of where to look, not of
    # moving pictures inside a token. Four times the tokens learn the keys in a quarter of the steps.
    "patch": (1, 1, 1),
    "dtype": "float32",
    "remat": "dots",  # on a CPU recomputing is cheaper than writing to memory: 1.2 times the steps
}

WORLD = {
    "networks": {"world": NETWORK},
    "codec": CODEC,
    "caption": "scene",  # the place, and the weather at the end of the crop
    "text": {"kind": "ngram", "dim": NETWORK["text_dim"], "length": NETWORK["text_len"]},
    # One game has one scale, and poses relative to the first frame say where the camera is looking.
    "pose": {"reference": "first", "translation": "metric"},
    "keyboard": {"turn_rate": YAW},
    "sample": {"steps": 8, "shift": 6.0, "solver": "euler", "guidance": {"low": 1.0, "high": 1.0}},
}


OPTIMIZER = {
    "algorithm": "muon",
    "learning_rate": 2e-3,
    "warmup": 50,
    "decay": "cosine",
    "b2": 0.99,
    "ema": 0.99,
}


def _data() -> dict:
    return {"path": f"{ROOT}/data", "frames": 17, "batch": 16}


def _collect() -> ConfigDict:
    fields = {"out": f"{ROOT}/data", "clips": 1280, "held_out": 96, "yaw": YAW, "clips_per_map": 4}
    return template(CollectConfig, fields | {"compression": "uncompressed"})


def _codec() -> ConfigDict:
    data = _data() | {"frames": 9, "batch": 8}
    return template(FitCodecConfig, {"out": f"{ROOT}/codec", "data": data, "codec": CODEC, "steps": 300})


def _encode() -> ConfigDict:
    """For the stages world and action, with --config.data.path=runs/demo/latents."""
    made = {"out": f"{ROOT}/latents", "data": _data(), "codec": f"{ROOT}/codec", "text": WORLD["text"]}
    return template(EncodeConfig, made | {"captions": (WORLD["caption"],), "grid": 8})


def _train(stage: str, steps: int, **fields: object) -> ConfigDict:
    run = {
        "run": f"{ROOT}/{stage}",
        "stage": stage,
        "steps": steps,
        "codec": f"{ROOT}/codec",
        "world": WORLD,
        "data": _data(),
        "tasks": {"continuation": 0.3, "max_conditioning_frames": 3},
        # High noise is where the keys decide what is seen. With more channels or less shift the first
        # components of the latents show through the noise, and the model reads them instead of the keys.
        "flow": {"shift": 12.0},
        "optimizer": OPTIMIZER,
        "checkpoint": {"every": 250},
    }
    return template(TrainConfig, run | fields)


# Chunks of one latent frame, a quarter of a second; the last two seconds and the first frame are seen.
CAUSAL = {
    "chunk": 1,
    "window": 9,
    "sink": 1,
    "schedule": "warped",
    "levels": (1000, 750, 500, 250),
    "shift": WORLD["sample"]["shift"],
}


def causal_world(world: dict, causal: dict) -> dict:
    """The world of a student: it generates chunks, and no whole clips."""
    return {name: part for name, part in world.items() if name != "sample"} | {"causal": causal}


CAUSAL_WORLD = causal_world(WORLD, CAUSAL)


def _causal() -> ConfigDict:
    return _train(
        "causal",
        600,
        init=f"{ROOT}/action",
        world=CAUSAL_WORLD,
        data=_data() | {"frames": 33, "batch": 8},
        tasks={"continuation": 0.0, "text_dropout": 0.0},
        optimizer=OPTIMIZER | {"learning_rate": 1e-3, "muon_rate": 0.01},
    )


def _distill() -> ConfigDict:
    # The teacher knows clips of five latent frames: so long are the windows that the scores see.
    return _train(
        "distill",
        300,
        init=f"{ROOT}/causal",
        teacher=f"{ROOT}/action",
        world=CAUSAL_WORLD,
        data=_data() | {"frames": 33, "batch": 8},
        tasks={"continuation": 0.0},
        distill={
            "critic_rate": 1.0,
            "shortest": 5,
            "window": 5,
            "gradient_chunks": 5,
            "scores": {"shift": WORLD["sample"]["shift"], "guidance": 1.0},
            "head": {"depths": (1, 3), "queries": 1, "width": 64, "heads": 4},
        },
        optimizer={
            "learning_rate": 2e-4,
            "warmup": 20,
            "b1": 0.0,
            "b2": 0.99,
            "weight_decay": 0.0,
            "ema": 0.95,
        },
    )


def _evaluate() -> ConfigDict:
    return template(EvaluateConfig, {"run": f"{ROOT}/action", "out": f"{ROOT}/evaluation"})


def _collect_long() -> ConfigDict:
    """Held-out clips of 8 s, on which models are compared."""
    fields = {"out": f"{ROOT}/long", "seed": 1, "clips": 1, "held_out": 24, "frames": 129, "yaw": YAW}
    return template(CollectConfig, fields | {"clips_per_map": 1, "compression": "uncompressed"})


def compare(root: str, **fields: object) -> ConfigDict:
    """The models of a root, on its long clips."""
    places = {
        "teacher": "action",
        "causal": "causal",
        "distilled": "distill",
        "path": "long",
        "out": "compare",
    }
    return template(CompareConfig, {name: f"{root}/{place}" for name, place in places.items()} | fields)


def get_config(experiment: str = "world") -> ConfigDict:
    made = {
        "collect": _collect,
        "codec": _codec,
        "encode": _encode,
        "world": lambda: _train("world", 1100),
        "action": lambda: _train("action", 100, init=f"{ROOT}/world"),
        "causal": _causal,
        "distill": _distill,
        "collect_long": _collect_long,
        "compare": lambda: compare(ROOT, clips=6),
        "evaluate": _evaluate,
    }
    if experiment not in made:
        raise ValueError(f"tiny.py:{experiment}: unknown experiment; choose one of {', '.join(made)}")
    return made[experiment]()
