"""Trains one stage of a world model; the same command again resumes the run.

python -m experiments.train --config=experiments/configs/tiny.py:world --config.steps=200

On a pod the same command runs on every host, with --distributed; where the cluster is not one that JAX
detects, --coordinator=HOST:PORT --processes=N --process=I as well. config.data.batch is clips a process.
Stages, curriculum, experts and what happens when a run is cut off: docs/training.md.
"""

import pathlib

import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh

from experiments import common
from experiments.codecs import open_codec
from lingbot_jax.config import ConfigError
from lingbot_jax.models import params
from lingbot_jax.models.dit import WorldDiT
from lingbot_jax.parallel import multihost, sharding
from lingbot_jax.serve import bundle
from lingbot_jax.training.checkpoints import SaveFailed
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.training.loop import NonFiniteLoss, read_run, train
from lingbot_jax.training.state import Arrays, flatten, put_paths

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
    codec, text_encoder = open_codec(config)
    try:
        train(config, codec, text_encoder, read_init)
    except (NonFiniteLoss, SaveFailed) as error:
        raise ConfigError(str(error)) from None


def read_init(init: str, config: TrainConfig, mesh: Mesh) -> Arrays:
    """Parameters of a run directory or, in float32, of a converted bundle: of the expert that is trained.

    Raises:
      ConfigError: neither is there, or the bundle has no transformer of that kind.
    """
    if not (pathlib.Path(init) / bundle.MANIFEST).is_file():
        return read_run(init, config, mesh)
    world = bundle.read_manifest(init).world
    wanted = {"single": ["world"], "both": ["high", "low"]}.get(config.expert, [config.expert])
    wanted = ["world"] if set(world) == {"world"} else wanted  # one transformer may start any expert
    missing = [name for name in wanted if name not in world]
    if missing:
        raise ConfigError(
            f"init = {init!r}: the bundle has {', '.join(world) or 'no transformer'}, expert = "
            f"{config.expert} needs {missing[0]}; choose another expert"
        )

    def arrays(name: str) -> Arrays:
        template = params.abstract(lambda key: WorldDiT(world[name], key))
        specs = {path: leaf.get_value() for path, leaf in params.flat_params(template).items()}
        places = sharding.shardings_by_path(specs, params.logical_axes(template), mesh)
        folder = bundle.params_folder(init, name)
        return flatten(bundle.restore(folder, template, jnp.float32, lambda path, _: places[path]))

    if len(wanted) == 1:
        return arrays(wanted[0])
    return {path: leaf for name in wanted for path, leaf in put_paths(arrays(name), name).items()}


if __name__ == "__main__":
    common.run(main)
