"""Named arrays in a folder: whole, in place, layer by layer; and every flipped bit is seen."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.worlds import checksums, storage


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "blocks.up.kernel": rng.normal(size=(3, 4, 6)).astype(np.float32),
        "blocks.up.bias": rng.normal(size=(3, 6)).astype(jnp.bfloat16),
        "embedding": rng.integers(-100, 100, (5, 2)).astype(np.int8),
        "zeros": np.zeros((3, 2), np.float32),
        "step": np.array(7, np.int32),
    }


def specs(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


@pytest.fixture
def folder(tmp_path):
    storage.write(tmp_path / "folder", arrays())
    return tmp_path / "folder"


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), array, err_msg=name)
        assert found[name].dtype == array.dtype


def test_arrays_come_back_in_any_structure_with_their_names(folder):
    equal(storage.read(folder, specs(arrays())), arrays())
    shapes = {
        "kernel": jax.ShapeDtypeStruct((3, 4, 6), jnp.bfloat16),
        "bias": jax.ShapeDtypeStruct((3, 6), "f4"),
    }
    found = storage.read(folder, {"blocks": {"up": shapes}}, partial=True)["blocks"]["up"]
    expected = arrays()["blocks.up.kernel"].astype(jnp.bfloat16)  # NumPy's rounding, not ours
    np.testing.assert_array_equal(np.asarray(found["kernel"]), expected)
    assert found["bias"].dtype == jnp.float32
    with pytest.raises(ConfigError, match=r"1 arrays do not fit: surplus blocks.up.bias$"):
        storage.read(
            folder, {name: spec for name, spec in specs(arrays()).items() if name != "blocks.up.bias"}
        )


def test_layers_written_one_by_one_make_the_same_folder(folder, tmp_path):
    writer = storage.Writer(tmp_path / "layers", specs(arrays()))
    for name, array in arrays().items():
        layers = range(3) if array.ndim > 1 and len(array) == 3 else (None,)
        for layer in layers:
            writer.write(name, layer, array if layer is None else array[layer])
    writer.close()
    equal(storage.read(tmp_path / "layers", specs(arrays())), arrays())
    digests = [(f / "digests" / "metadata").read_text() for f in (folder, tmp_path / "layers")]
    assert digests[0] == digests[1]
    with ocp.PyTreeCheckpointer() as orbax:  # and so does Orbax itself
        equal(orbax.restore(tmp_path / "layers" / "arrays"), arrays())
    reader = storage.Reader(tmp_path / "layers")
    for name, array in arrays().items():
        assert (reader.specs[name].shape, reader.specs[name].dtype) == (array.shape, array.dtype)
    for layer in (2, 0, 1):
        array = arrays()["blocks.up.bias"][layer]
        np.testing.assert_array_equal(reader.read("blocks.up.bias", layer), array)


def test_large_arrays_are_stored_in_chunks_of_a_layer_or_less(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "CHUNK_BYTES", 64)
    storage.Writer(tmp_path / "layers", {"a": jax.ShapeDtypeStruct((3, 4, 8), jnp.float32)})
    described = json.loads((tmp_path / "layers" / "arrays" / "a" / ".zarray").read_text())
    assert described["chunks"] == [1, 2, 8] and described["compressor"] is None


def test_folder_that_was_not_closed_is_refused(tmp_path):
    storage.Writer(tmp_path / "cut", specs(arrays()))
    with pytest.raises(storage.Damaged, match=r"^\S+cut: cannot be read \([^\n]*\)$"):
        storage.read(tmp_path / "cut", specs(arrays()))


def test_arrays_that_do_not_fit_are_one_line_with_five_and_a_count(folder):
    wanted = specs(arrays()) | {f"more.{i}": jax.ShapeDtypeStruct((1,), jnp.float32) for i in range(6)}
    wanted["embedding"] = jax.ShapeDtypeStruct((5, 3), jnp.int8)
    del wanted["step"]
    with pytest.raises(ConfigError) as error:
        storage.read(folder, wanted)
    text = str(error.value)
    assert text.startswith(f"{folder}: 8 arrays do not fit: missing more.0; ") and text.endswith("and 3 more")
    assert "\n" not in text
    wanted = {name: spec for name, spec in wanted.items() if not name.startswith("more")}
    with pytest.raises(ConfigError, match=r"surplus step; misshapen embedding \[5, 2\], needs \[5, 3\]$"):
        storage.read(folder, wanted)


def test_every_flipped_bit_of_a_small_folder_is_seen(folder):
    """Every file, several places, every bit of them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    wanted, unseen = specs(arrays()), []
    for path in files:
        whole = path.read_bytes()
        places = sorted({0, len(whole) // 3, len(whole) // 2, len(whole) - 1})
        for place in places:
            for bit in range(0, 8, 3):
                cut = bytearray(whole)
                cut[place] ^= 1 << bit
                path.write_bytes(cut)
                try:
                    storage.read(folder, wanted)
                    unseen.append((str(path.relative_to(folder)), place, bit))
                except storage.Damaged:
                    pass
        path.write_bytes(whole)
    assert not unseen
    equal(storage.read(folder, wanted), arrays())


def test_reader_sees_a_flipped_bit_with_the_last_layer(folder):
    path = folder / "arrays" / "blocks.up.kernel" / "1.0.0"
    cut = bytearray(path.read_bytes())
    cut[5] ^= 16
    path.write_bytes(cut)
    reader = storage.Reader(folder)
    reader.read("blocks.up.kernel", 0)
    reader.read("blocks.up.kernel", 1)
    with pytest.raises(storage.Damaged, match="the values of blocks.up.kernel do not match their digest"):
        reader.read("blocks.up.kernel", 2)


def test_a_kill_before_the_seal_loses_nothing(folder):
    (folder / "seal.json").unlink()
    equal(storage.read(folder, specs(arrays())), arrays())


def murmur(x: int) -> int:
    """MurmurHash3's finaliser in Python integers."""
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


@pytest.mark.parametrize("name", ["blocks.up.kernel", "blocks.up.bias", "embedding"])
def test_digest_is_the_written_sum(name):
    array = arrays()[name]
    words = array.ravel().view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
    sums = sum(murmur(int(w) ^ murmur((i + 0x9E3779B9) % 2**32)) for i, w in enumerate(words))
    assert int(checksums.digest(jnp.asarray(array))) == sums % 2**32


def test_digest_sees_what_a_weighted_sum_does_not():
    """Two flipped signs cancel in any sum of odd weights times bits."""
    x = np.ones((4,), np.float32)
    y = np.float32([-1, -1, 1, 1])
    assert int(checksums.digest(jnp.asarray(x))) != int(checksums.digest(jnp.asarray(y)))


@pytest.mark.parametrize("bad", ["a file", "no rights"])
def test_folder_that_cannot_be_written_is_one_line(tmp_path, bad):
    place = tmp_path / "file" / "x" if bad == "a file" else "/proc/no/x"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^\S+: cannot be written \([^\n]+\)$"):
        storage.write(place, arrays())
