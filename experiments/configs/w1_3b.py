"""The 1.3B geometry of Wan 2.1 at 480p: the settings of w14b.py at a size for small slices and ablations.

python -m experiments.plan --config=experiments/configs/w1_3b.py:world --topology=v5e:4x4
"""

import dataclasses

from ml_collections import ConfigDict

from experiments.configs import w14b
from lingbot_jax.config import W1_3B

ROOT = "runs/w1_3b"


def get_config(stage: str = "world") -> ConfigDict:
    config = w14b.get_config(stage)
    config.model.update(dataclasses.asdict(W1_3B) | {k: config.model[k] for k in ("control", "remat")})
    config.run, config.codec, config.data.path = (
        f"{ROOT}/{stage}",
        f"{ROOT}/codec.safetensors",
        f"{ROOT}/data",
    )
    config.expert = "single"
    config.mesh.seq = 4  # 12 heads
    return config
