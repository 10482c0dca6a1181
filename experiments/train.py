"""Trains one stage of a world model; the same command again resumes the run.

python -m experiments.train --config=experiments/configs/tiny.py:world --config.steps=200

On a pod the same command runs on every host, with --distributed; where the cluster is not one that JAX
detects, --coordinator=HOST:PORT --processes=N --process=I as well. config.data.batch is clips a process.
"""

from absl import flags

from experiments import common
from lingbot_jax.config import ConfigError
from lingbot_jax.data.loader import TrainLoader
from lingbot_jax.models.codec import load_linear
from lingbot_jax.models.text import HashedNgramEncoder
from lingbot_jax.parallel import multihost
from lingbot_jax.parallel.mesh import make_mesh
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.training.loop import NonFiniteLoss, train

CONFIG = common.define_config()
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "this is one process of several")
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, if it is not detected")
PROCESSES = flags.DEFINE_integer("processes", None, "how many processes, if that is not detected")
PROCESS = flags.DEFINE_integer("process", None, "which process this is, if that is not detected")


def main() -> None:
    config = common.load(CONFIG, TrainConfig)
    if DISTRIBUTED.value:
        multihost.initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    with multihost.guard():
        run(config)


def run(config: TrainConfig) -> None:
    codec = load_linear(config.codec)
    text_encoder = HashedNgramEncoder(config.model.text_dim, config.model.text_len)
    loader = TrainLoader(config.data, multihost.data_shard(make_mesh(config.mesh)))
    try:
        train(config, codec, text_encoder, loader)
    except NonFiniteLoss as error:
        raise ConfigError(str(error)) from None


if __name__ == "__main__":
    common.run(main)
