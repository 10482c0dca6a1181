"""int8 parameters: off by half a step at most, half the bytes, the same world again, and damage is seen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.convert import contents, report, write
from lingbot_jax.models import params
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.worlds import quantization
from lingbot_jax.worlds.open import open_world
from tests.rollout.worlds import TINY, TINY_WORLD, world, write_bundle

WIDE: DiTConfig = dataclasses.replace(TINY, dim=64, ffn=96)  # some matrices are worth it, others are not
WORLD = dataclasses.replace(TINY_WORLD, networks={"world": WIDE})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    whole = world(WORLD)
    found = contents.look(str(write_bundle(folder / "whole", whole)))
    write.to_bundle(found, folder / "small", dtype="int8")
    return folder, whole


def test_a_value_is_off_by_half_a_step_at_most():
    value = np.random.default_rng(0).normal(size=(3, 40, 8)) * 10.0 ** np.arange(-4, 4)
    value[0, :, 0] = 0.0
    small, scale = quantization.quantize(value)
    assert small.dtype == np.int8 and scale.shape == (3, 1, 8) and np.isfinite(scale).all()
    assert (np.abs(small * scale - value) <= 0.5001 * scale).all() and np.abs(small).max() == 127
    assert (small[0, :, 0] == 0).all()


def test_a_world_comes_back_from_int8(made):
    folder, whole = made
    opened = open_world(folder / "small", dtype=jnp.float32)
    before, after = (params.arrays_of(w.networks["world"]) for w in (whole, opened))
    for path, value in before.items():
        assert after[path].dtype == jnp.float32
        value, error = np.asarray(value), np.abs(np.asarray(after[path]) - value)
        scale = np.abs(value).max(-2, keepdims=True) / 127 if value.ndim > 1 else 0.0
        assert (error <= 0.51 * scale + 0.004 * np.abs(value)).all(), path
    for path, value in params.arrays_of(whole.codec).items():  # its rounding would show in the picture
        np.testing.assert_array_equal(params.arrays_of(opened.codec)[path], value)


def test_it_takes_half_the_bytes_and_counts_the_same(made):
    folder, _ = made
    source = contents.look(str(folder / "whole")).parts[0]
    sizes = {dtype: write.nbytes(write.cast(source, dtype).specs) for dtype in ("bfloat16", "int8")}
    assert sizes["int8"] < 0.7 * sizes["bfloat16"]
    assert report.parameters(write.cast(source, "int8")) == report.parameters(source)


def test_it_converts_on_and_not_to_published_names(made, tmp_path):
    folder, _ = made
    found = contents.look(str(folder / "small"))
    write.to_bundle(found, tmp_path / "again", dtype="keep")
    one, other = (open_world(f, dtype=jnp.bfloat16) for f in (folder / "small", tmp_path / "again"))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), one.networks, other.networks)
    assert all(jax.tree.leaves(same))
    with pytest.raises(ConfigError, match="dtype = 'int8': only of a bundle"):
        write.to_published(found, tmp_path / "published", dtype="int8")


def test_nan_is_refused(made, tmp_path):
    folder, _ = made
    part = contents.look(str(folder / "whole")).parts[0]
    bad = dataclasses.replace(part, open=lambda: lambda path, layer: np.full((64, 96), np.nan, np.float32))
    with pytest.raises(ConfigError, match="holds NaN"):
        write.cast(bad, "int8").open()("blocks.ffn.up.kernel", 0)
