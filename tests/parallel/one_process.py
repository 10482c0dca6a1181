"""Programs that `test_two_processes` runs in processes of their own.

python -m tests.parallel.one_process merged FOLDER RUN    one process, both processes' data
python -m tests.parallel.one_process restore FOLDER RUN   onto one and onto four devices
"""

import dataclasses
import pathlib
import sys

import jax
import numpy as np

from lingbot_jax.data.loader import TrainLoader
from lingbot_jax.models.codec import load_linear
from lingbot_jax.models.text import HashedNgramEncoder
from lingbot_jax.parallel.mesh import MeshConfig, make_mesh
from lingbot_jax.training.checkpoints import load_config, load_ema
from lingbot_jax.training.loop import train


class Merged:
    """The loaders of all parts of a batch as one: their windows behind each other."""

    def __init__(self, loaders):
        self._loaders = loaders

    def __next__(self):
        windows = [next(loader) for loader in self._loaders]
        merged = {name: np.concatenate([w[name] for w in windows]) for name in windows[0]}
        assert len(set(merged["record_ids"])) == len(merged["record_ids"]), "a clip was loaded twice"
        return merged

    def get_state(self):
        return {}

    def close(self):
        for loader in self._loaders:
            loader.close()


def merged(folder: pathlib.Path, run: str) -> None:
    """Trains like the two processes of `run`, in one process on one device, into `run`-merged."""
    config = load_config(folder / run)
    parts = {phase.data: phase.mesh.fsdp for phase in config.phases()}
    alone = tuple(dataclasses.replace(phase, mesh=MeshConfig()) for phase in config.curriculum)
    config = dataclasses.replace(config, run=str(folder / f"{run}-merged"), curriculum=alone)
    text_encoder = HashedNgramEncoder(config.model.text_dim, config.model.text_len)

    def make_loader(data, _, transform):
        return Merged([TrainLoader(data, (index, parts[data]), transform) for index in range(parts[data])])

    train(config, load_linear(config.codec), text_encoder, make_loader=make_loader)


def restore(folder: pathlib.Path, run: str) -> None:
    """Reads what two processes wrote onto one and onto four devices; every value arrives, in its place."""
    assert jax.device_count() == 4
    four = load_ema(folder / run, make_mesh(MeshConfig(1, 2, 2)))
    one = load_ema(folder / run)
    assert one.keys() == four.keys() and one
    for path, array in four.items():
        np.testing.assert_array_equal(array, one[path], err_msg=path)
        if path.endswith("ffn.up.kernel"):
            assert array.addressable_shards[0].data.size * 4 == array.size, path
    print(f"restored {len(one)} arrays")


if __name__ == "__main__":
    command, folder, *rest = sys.argv[1:]
    {"merged": merged, "restore": restore}[command](pathlib.Path(folder), *rest)
