"""The package as a library: `import lingbot_jax`, from any folder, with the world's own settings."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import lingbot_jax
from lingbot_jax.config import ConfigError
from tests.rollout.worlds import world, write_bundle

NOTEBOOK = pathlib.Path(__file__).parents[1] / "docs" / "walk.ipynb"


def test_importing_configs_imports_no_jax():
    code = (
        "import sys, lingbot_jax, lingbot_jax.config; assert 'jax' not in sys.modules; "
        "lingbot_jax.open_world; assert 'jax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"JAX_PLATFORMS": "cpu", "PATH": ""})
    with pytest.raises(AttributeError, match="no attribute 'open_wrld'"):
        lingbot_jax.open_wrld  # noqa: B018


def test_experiments_can_be_imported_together():
    """Flags of several do not clash, and of generate none exists before it is run."""
    names = ["collect", "fit_codec", "train", "generate", "evaluate", "convert", "plan", "quickstart"]
    code = "".join(f"import experiments.{name}; " for name in names)
    code += "from absl import flags; assert 'zoom' not in flags.FLAGS and 'config' in flags.FLAGS"
    subprocess.run([sys.executable, "-c", code], check=True, env={"JAX_PLATFORMS": "cpu", "PATH": ""})


def test_the_notebook_walks_a_world_from_its_own_folder(tmp_path, monkeypatch, caplog):
    """Every code cell, in order and in one namespace, as Jupyter runs them; last expressions are evaluated too."""
    write_bundle(tmp_path / "runs" / "demo" / "action", world())
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (16, 32, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "runs" / "demo" / "first_frame.png")
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")
    names = {}
    for i, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {i}", "exec"), names)
    assert names["session"].config.keyboard == world().config.keyboard
    assert names["frames"].shape == (13, 16, 32, 3) and (names["left"] != names["right"]).any()
    assert (tmp_path / "docs" / "walk.mp4").stat().st_size > 0


def test_what_is_no_world_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="run = '.*': neither a run .* nor a bundle") as error:
        lingbot_jax.open_world(tmp_path)
    assert "\n" not in str(error.value)
