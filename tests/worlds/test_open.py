"""Opening a world puts every array where, and as, its programs want it."""

import jax
import numpy as np
from jax.experimental.layout import Format, Layout

from lingbot_jax.models import params
from lingbot_jax.parallel import sharding
from lingbot_jax.worlds.open import default_mesh, open_world
from tests.rollout.worlds import world, write_bundle


def test_stacks_of_matrices_lie_in_the_tiles_that_are_asked_for(tmp_path, monkeypatch):
    """As on a tpu7x with whole parameters: read as JAX lays them out, kept in another way, and worth the same."""
    folder = write_bundle(tmp_path / "bundle", world())
    plain = open_world(folder, default_mesh("whole"))
    columns = lambda leaf, place: Format(Layout((0, 2, 1)), place) if len(leaf.shape) == 3 else place
    monkeypatch.setattr(sharding, "stacked_format", columns)
    laid = open_world(folder, default_mesh("whole"))
    arrays = params.arrays_of(laid.networks["world"])
    stacks = {path: a for path, a in arrays.items() if path.startswith("blocks.") and a.ndim == 3}
    assert len(stacks) > 5
    assert all(a.format.layout.major_to_minor == (0, 2, 1) for a in stacks.values())
    for path, value in params.arrays_of(plain.networks["world"]).items():
        np.testing.assert_array_equal(arrays[path], value, err_msg=path)
    image = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)
    frames = []
    for opened in (plain, laid):
        session = opened.session()
        session.start(image, "a hall", seed=1)
        frames.append(session.step(np.eye(8, dtype=bool)[0]))
    assert jax.device_count() == 1 and np.abs(frames[0].astype(int) - frames[1]).max() <= 1
