"""Curation of videos: every field at its default (`--config.size=48,64` and the like change them).

python -m experiments.curate --config=experiments/configs/curate.py --config.source=FOLDER --config.out=DIR
"""

from ml_collections import ConfigDict

from lingbot_jax.config import template
from lingbot_jax.engine.curate.config import CurateConfig


def get_config() -> ConfigDict:
    return template(CurateConfig, {"source": "videos", "out": "runs/curated"})
