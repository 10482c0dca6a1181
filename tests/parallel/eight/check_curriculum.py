"""A run whose phases have meshes of their own, cut off in the second: the losses of a run that stays on one mesh."""

import dataclasses

import numpy as np

from lingbot_jax.training.config import CheckpointConfig, Phase
from tests.training import micro


def test_the_state_moves_from_mesh_to_mesh(tmp_path):
    micro.make_data(tmp_path)
    phase = lambda end, *mesh: Phase(end_step=end, batch=8, mesh=micro.mesh(*mesh))
    stays = micro.config(tmp_path, "stays", steps=5, curriculum=(phase(2, 8, 1, 1), phase(5, 8, 1, 1)))
    moves = dataclasses.replace(
        stays,
        run=str(tmp_path / "moves"),
        curriculum=(phase(2, 1, 8, 1), phase(5, 2, 2, 2)),
        checkpoint=CheckpointConfig(every=3),
    )
    micro.train(stays)
    micro.train(dataclasses.replace(moves, steps=3))
    micro.train(moves)
    wanted, found = micro.losses_of(stays), micro.losses_of(moves)
    assert list(found) == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-4)
