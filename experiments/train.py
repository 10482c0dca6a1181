"""Trains one stage of a world model; the same command again resumes the run.

python -m experiments.train --config=experiments/configs/tiny.py:world --config.steps=200
"""

from experiments import common
from lingbot_jax.config import ConfigError
from lingbot_jax.data.loader import TrainLoader
from lingbot_jax.models.codec import load_linear
from lingbot_jax.models.text import HashedNgramEncoder
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.training.loop import NonFiniteLoss, train

CONFIG = common.define_config()


def main() -> None:
    config = common.load(CONFIG, TrainConfig)
    codec = load_linear(config.codec)
    text_encoder = HashedNgramEncoder(config.model.text_dim, config.model.text_len)
    loader = TrainLoader(config.data)
    try:
        train(config, codec, text_encoder, loader)
    except NonFiniteLoss as error:
        raise ConfigError(str(error)) from None


if __name__ == "__main__":
    common.run(main)
