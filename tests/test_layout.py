"""The structure of the code: arrows point one way, files stay short, every option is read."""

import ast
import dataclasses
import pathlib
import re

import pytest
from lingbot_jax.rollout.bidirectional import SampleConfig

from experiments.configs import schema
from lingbot_jax import config
from lingbot_jax.data.loader import LoaderConfig
from lingbot_jax.diffusion.guidance import Guidance
from lingbot_jax.engine.collect.config import CollectConfig
from lingbot_jax.parallel.mesh import MeshConfig
from lingbot_jax.training import config as training

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("lingbot_jax", "kernels_pallas", "experiments")
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))

# What a package must not import: arrows point from experiments down to kernels.
MODELS_UP = ("lingbot_jax.rollout", "lingbot_jax.training", "lingbot_jax.evaluation", "lingbot_jax.serve")
FORBIDDEN = {
    "kernels_pallas": ("lingbot_jax", "experiments", "tests"),
    "lingbot_jax": ("experiments", "tests"),
    "lingbot_jax/control": ("lingbot_jax.models", "lingbot_jax.diffusion", "lingbot_jax.data", *MODELS_UP),
    "lingbot_jax/parallel": (
        "lingbot_jax.models.dit",
        "lingbot_jax.diffusion",
        "lingbot_jax.data",
        *MODELS_UP,
    ),
    "lingbot_jax/models": ("lingbot_jax.diffusion", "lingbot_jax.data", "lingbot_jax.engine", *MODELS_UP),
    "lingbot_jax/diffusion": ("lingbot_jax.data", "lingbot_jax.engine", *MODELS_UP),
    "lingbot_jax/data": ("lingbot_jax.models", "lingbot_jax.diffusion", *MODELS_UP),
    "lingbot_jax/engine": ("lingbot_jax.models", "lingbot_jax.diffusion", *MODELS_UP),
    "lingbot_jax/rollout": ("lingbot_jax.evaluation", "lingbot_jax.serve"),
    "lingbot_jax/training": ("lingbot_jax.evaluation", "lingbot_jax.serve"),
}


def imports(path: pathlib.Path) -> set[str]:
    """Dotted names a file imports, `from a import b` as a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_arrows_point_one_way(package):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / package).rglob("*.py")
        for name in sorted(imports(path))
        for forbidden in FORBIDDEN[package]
        if name == forbidden or name.startswith(forbidden + ".")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_private_jax():
    wrong = [str(p.relative_to(ROOT)) for p in SOURCES if any(n.startswith("jax._src") for n in imports(p))]
    assert not wrong


def test_files_are_short():
    limit = lambda p: 700 if p.parts[len(ROOT.parts)] == "kernels_pallas" else 450
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > limit(p)}
    assert not long


CONFIGS = [
    config.DiTConfig,
    CodecConfig,
    LoaderConfig,
    CollectConfig,
    MeshConfig,
    Guidance,
    SampleConfig,
    schema.PrepareConfig,
    schema.EvaluateConfig,
    training.PoseConfig,
    training.TaskConfig,
    training.FlowConfig,
    training.OptimizerConfig,
    training.CheckpointConfig,
    training.TrainConfig,
]


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_every_option_is_read(kind):
    """Each field is read as an attribute somewhere besides the checks of its own class."""
    own = ast.unparse(
        next(
            node
            for node in ast.walk(
                ast.parse(pathlib.Path(__import__(kind.__module__, fromlist=["x"]).__file__).read_text())
            )
            if isinstance(node, ast.ClassDef) and node.name == kind.__name__
        )
    )
    outside = "\n".join(ast.unparse(ast.parse(p.read_text())) for p in SOURCES).replace(own, "")
    unread = [
        f.name
        for f in dataclasses.fields(kind)
        if not re.search(rf"\.{f.name}\b(?!\s*=[^=])", outside)
        and not re.search(
            rf"self\.{f.name}\b", re.sub(r"def __post_init__.*?(?=\n    def |\Z)", "", own, flags=re.S)
        )
    ]
    assert not unread
