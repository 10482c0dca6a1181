"""The tiny world: trains on a laptop CPU in minutes on real game frames.

One argument names the experiment: `tiny.py:collect`, `:codec`, `:world`, `:action`. Everything lives under
`root` (default runs/demo). `make demo` runs them in this order.
"""

from ml_collections import ConfigDict

ROOT = "runs/demo"


def _model() -> dict:
    return {
        "dim": 192,
        "layers": 4,
        "heads": 6,
        "ffn": 768,
        "freq_dim": 64,
        "text_dim": 64,
        "text_len": 8,
        "latent_channels": 24,
        "control": "cam_act",
        "dtype": "float32",
    }


def _train(stage: str) -> ConfigDict:
    return ConfigDict(
        {
            "run": f"{ROOT}/{stage}",
            "stage": stage,
            "steps": 1000,
            "codec": f"{ROOT}/codec.safetensors",
            "model": _model(),
            "data": {"path": f"{ROOT}/data", "frames": 33, "batch": 16},
            # One game has one scale, and poses relative to the first frame say where the camera is looking.
            "pose": {"reference": "first", "translation": "metric"},
            "tasks": {"continuation": 0.3, "max_given": 3},
            "flow": {"shift": 3.0},
            "optimizer": {"learning_rate": 2e-3, "warmup": 50, "decay": "cosine", "ema": 0.99},
            "checkpoint": {"every": 200},
        }
    )


def get_config(experiment: str = "world") -> ConfigDict:
    if experiment in ("world", "action"):
        return _train(experiment)
    raise ValueError(f"tiny.py:{experiment}: unknown experiment; choose collect, codec, world or action")
