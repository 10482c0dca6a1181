"""Collects clips from a game: frames, keys, camera poses (docs/data.md).

    python -m experiments.collect --config=experiments/configs/tiny.py:collect --config.clips=64

Run it again to go on where it stopped. Needs the extra `data`.
"""

from experiments import common
from lingbot_jax.engine.collect.config import CollectConfig

CONFIG = common.define_config()


def main() -> None:
    config = common.load(CONFIG, CollectConfig)
    try:
        from lingbot_jax.engine.collect.collector import collect
    except ModuleNotFoundError as error:
        raise common.UserError(f"{error.name} is not installed: pip install -e '.[data]'") from None
    print(collect(config))


if __name__ == "__main__":
    common.run(main)
