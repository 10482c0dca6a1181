"""Trains one stage of a world model; the same command again resumes the run.

python -m experiments.train --config=experiments/configs/tiny.py:world --config.steps=200

On a pod the same command runs on every host, with --distributed; where the cluster is not one that JAX
detects, --coordinator=HOST:PORT --processes=N --process=I as well. config.data.batch is clips per step, over all.
Exit codes: 0 the run is complete, 2 a mistake of the user, 143 stopped by SIGTERM and saved, 75 and 134 another
process was lost, 124 a wait passed its bound; after all but 0 and 2 the same command goes on. Stages, curriculum,
experts: docs/training.md.
"""

import sys

from absl import flags

from experiments import common
from lingbot_jax.config import ConfigError
from lingbot_jax.evaluation.suite import make_validation
from lingbot_jax.parallel import multihost
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.training.loop import train
from lingbot_jax.training.report import NonFiniteLoss
from lingbot_jax.worlds.checkpoints import SaveFailed

CONFIG = common.define_config(TrainConfig)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "this is one process of several")
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, if it is not detected")
PROCESSES = flags.DEFINE_integer("processes", None, "how many processes, if that is not detected")
PROCESS = flags.DEFINE_integer("process", None, "which process this is, if that is not detected")
PROFILE = flags.DEFINE_string("profile", "", "steps to trace for XProf, into RUN/tensorboard: 100 or 100-105")


def main() -> None:
    config = common.load(CONFIG, TrainConfig)
    if DISTRIBUTED.value:
        multihost.initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    with multihost.guard():
        run(config, PROFILE.value)


def run(config: TrainConfig, profile: str = "") -> None:
    try:
        train(config, make_validation(config), profile)
    except (NonFiniteLoss, SaveFailed) as error:
        raise ConfigError(str(error)) from None
    except multihost.Preempted as stopped:
        print(f"{stopped}; the same command resumes", flush=True)
        sys.exit(multihost.PREEMPTED)


if __name__ == "__main__":
    common.run(main)
