"""The manifest of a bundle: what was changed, is gone or is of another bundle is refused with its name."""

import json

import numpy as np
import pytest
from etils import epath

from lingbot_jax.config import ConfigError
from lingbot_jax.worlds import manifest
from lingbot_jax.worlds.open import BUNDLE, bundle_text, find, open_world
from tests.rollout.worlds import TINY_WORLD, world, write_bundle

IMAGE = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)


@pytest.fixture
def bundle(tmp_path):
    folder = epath.Path(write_bundle(tmp_path / "bundle", world()))
    described = {BUNDLE: bundle_text(TINY_WORLD).encode()}
    shown = ((IMAGE, "a hall", (16.0, 16.0, 16.0, 8.0)), (IMAGE, "", None))
    manifest.write(folder, described, manifest.Starts(shown, 16.0))
    return folder


def test_pictures_come_back(bundle):
    made = manifest.read(bundle)
    assert made.fps == 16.0 and [p.prompt for p in made.pictures] == ["a hall", ""]
    assert made.pictures[0].intrinsics == (16.0, 16.0, 16.0, 8.0) and made.pictures[1].intrinsics is None
    np.testing.assert_array_equal(manifest.image(bundle, made.pictures[0]), IMAGE)
    assert open_world(bundle).config == TINY_WORLD


@pytest.mark.parametrize(
    "path", [BUNDLE, "pictures/01.png", "params/world/seal.json", "params/codec/seal.json"]
)
def test_a_changed_byte_and_a_missing_file_are_named(bundle, path):
    content = (bundle / path).read_bytes()
    at = content.index(b"1")  # the sizes stay valid: only the hash tells
    (bundle / path).write_bytes(content[:at] + b"2" + content[at + 1 :])
    if path == BUNDLE:
        (bundle / path).write_bytes(content.replace(b'"shift": 3.0', b'"shift": 4.0'))
    with pytest.raises(ConfigError, match=f"run = .*: {path} was changed after writing"):
        find(bundle)
    (bundle / path).unlink()
    with pytest.raises(ConfigError, match="neither a run|is gone"):
        find(bundle)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "pictures/../../x", "a/b/c/d/e"])
def test_a_path_out_of_the_folder_is_refused(bundle, path):
    values = json.loads((bundle / manifest.MANIFEST).read_text())
    for changed in (
        values | {"files": values["files"] | {path: "0" * 64}},
        values | {"pictures": [{"file": path}]},
    ):
        (bundle / manifest.MANIFEST).write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=r"manifest.json"):
            manifest.read(bundle)
