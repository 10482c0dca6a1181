"""Trains a converted checkpoint on: sizes, codec, text encoder and conventions are the bundle's own.

    python -m experiments.train --config=experiments/configs/bundle.py:action,bundles/base-cam \
        --config.run=runs/mine --config.data.path=data/mine --config.data.frames=81 --config.size="(480, 832)"

The argument is STAGE,BUNDLE; a run directory serves as well. Any field can be overridden as everywhere.
"""

import dataclasses

from ml_collections import ConfigDict

from lingbot_jax.config import ConfigError, template
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.worlds.open import find


def get_config(argument: str = "") -> ConfigDict:
    stage, _, source = argument.partition(",")
    if stage not in ("world", "action") or not source:
        raise ConfigError(
            f"config = bundle.py:{argument}: must be bundle.py:world,BUNDLE or bundle.py:action,BUNDLE"
        )
    world = dataclasses.asdict(find(source, "config").config)
    for network in world["networks"].values():
        network["remat"] = "full"
    fields = {
        "run": "runs/bundle",
        "stage": stage,
        "steps": 1000,
        "init": source,
        "codec": source,
        "world": world,
    }
    return template(TrainConfig, fields | {"data": {"path": "data", "frames": 81}})
