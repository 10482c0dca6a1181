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
    """The loaders of all processes as one: their batches behind each other."""

    def __init__(self, loaders):
        self._loaders = loaders

    def __next__(self):
        windows = [next(loader) for loader in self._loaders]
        ids = [set(window["record_ids"]) for window in windows]
        assert not ids[0] & ids[1], "two processes loaded the same clip"
        return {name: np.concatenate([w[name] for w in windows]) for name in windows[0]}

    def get_state(self):
        return {}


def merged(folder: pathlib.Path, run: str) -> None:
    """Trains like the two processes of `run`, in one process on one device, into `run`-merged."""
    config = load_config(folder / run)
    config = dataclasses.replace(config, run=str(folder / f"{run}-merged"))
    loaders = [TrainLoader(config.data, (index, 2)) for index in range(2)]
    text_encoder = HashedNgramEncoder(config.model.text_dim, config.model.text_len)
    train(config, load_linear(config.codec), text_encoder, make_loader=lambda *_: Merged(loaders))


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
