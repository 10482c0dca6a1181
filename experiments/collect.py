"""Collects clips from generated places or a game: frames, keys, camera poses, and a card (docs/data.md).

    python -m experiments.collect --config=experiments/configs/tiny.py:collect --config.clips=64 \\
        --config.source=vizdoom

Run it again to go on where it stopped. Needs the extra `data`.
"""

import shlex
import sys

from experiments import common
from lingbot_jax.engine.collect.config import CollectConfig

CONFIG = common.define_config(CollectConfig)


def main() -> None:
    config = common.load(CONFIG, CollectConfig)
    engine = {"rendered": "panda3d", "vizdoom": "vizdoom"}[config.source]
    common.need("data", engine, "cv2", "array_record", "psutil")
    from lingbot_jax.engine.collect.collector import collect

    command = shlex.join(["python", "-m", "experiments.collect", *sys.argv[1:]])
    print(collect(config, command=command))


if __name__ == "__main__":
    common.run(main)
