"""Programs that `test_two_processes` runs in processes of their own.

python -m tests.parallel.one_process alone FOLDER RUN     the run's config in one process, on one device
python -m tests.parallel.one_process restore FOLDER RUN   onto one and onto four devices
"""

import dataclasses
import pathlib
import sys

import jax
import numpy as np

from lingbot_jax.models import params
from lingbot_jax.parallel.mesh import make_mesh
from lingbot_jax.training.loop import train
from lingbot_jax.training.run_dir import load_config
from lingbot_jax.worlds.open import open_world
from tests.training import micro


def alone(folder: pathlib.Path, run: str) -> None:
    """Trains like the two processes of `run`, in one process on one device, into `run`-alone."""
    config = load_config(folder / run)
    phases = tuple(dataclasses.replace(phase, mesh=micro.mesh()) for phase in config.curriculum)
    codec = str(folder / "codec")
    train(dataclasses.replace(config, run=str(folder / f"{run}-alone"), curriculum=phases, codec=codec))


def restore(folder: pathlib.Path, run: str) -> None:
    """Reads what two processes wrote onto one and onto four devices; every value arrives, in its place."""
    assert jax.device_count() == 4
    meshes = make_mesh(micro.mesh(1, 2, 2)), make_mesh(micro.mesh(), jax.devices()[:1])
    four, one = (params.arrays_of(open_world(folder / run, mesh).networks["world"]) for mesh in meshes)
    assert one.keys() == four.keys() and one
    for path, array in four.items():
        np.testing.assert_array_equal(array, one[path], err_msg=path)
        if path.endswith("ffn.up.kernel"):
            assert array.addressable_shards[0].data.size * 4 == array.size, path
    print(f"restored {len(one)} arrays")


if __name__ == "__main__":
    command, folder, *rest = sys.argv[1:]
    {"alone": alone, "restore": restore}[command](pathlib.Path(folder), *rest)
