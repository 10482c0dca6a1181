"""Strict configs: one line that names the field, its value and what is allowed."""

import dataclasses
import importlib.util
import pathlib
from typing import Literal

import pytest

from lingbot_jax.config import ConfigError, build, template
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.training.config import TrainConfig

CONFIGS = pathlib.Path(__file__).parents[1] / "experiments" / "configs"


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int
    kind: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True)
class Outer:
    rate: float
    inner: Inner
    shape: tuple[int, int] = (1, 2)
    note: str | None = None


GOOD = {"rate": 1, "inner": {"size": 3}, "shape": [4, 5]}


def test_builds_nested_dataclasses_and_widens_ints_to_floats():
    made = build(Outer, GOOD)
    assert made == Outer(1.0, Inner(3), (4, 5))
    assert isinstance(made.rate, float)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"rat": 1}, "config.rat: unknown field; allowed: inner, note, rate, shape"),
        ({"rate": "fast"}, "config.rate = 'fast': must be float"),
        ({"rate": True}, "config.rate = True: must be float"),
        ({"inner": {"size": 2.5}}, "config.inner.size = 2.5: must be int"),
        ({"inner": {"size": 1, "kind": "c"}}, "config.inner.kind = 'c': must be one of 'a', 'b'"),
        ({"inner": {}}, "config.inner.size: missing; it has no default"),
        ({"inner": 4}, "config.inner = 4: must be a group of fields (Inner)"),
        ({"shape": (1, 2, 3)}, "config.shape = (1, 2, 3): must have 2 items"),
        ({"note": 3}, "config.note = 3: must be str"),
    ],
)
def test_refuses_with_one_line(change, line):
    with pytest.raises(ConfigError) as error:
        build(Outer, GOOD | change)
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"heads": 5}, "model.heads"),
        ({"dim": 36, "heads": 4}, "model.heads"),
        ({"freq_dim": 63}, "model.freq_dim"),
    ],
)
def test_impossible_models_are_refused(change, field):
    with pytest.raises(ConfigError, match=field):
        DiTConfig(**({"dim": 32, "layers": 1, "heads": 4, "ffn": 64} | change))


def test_template_shows_every_field_so_that_all_can_be_overridden():
    made = template(Outer, {"rate": 2.0, "inner": {"size": 1}})
    assert made.to_dict() == {"rate": 2.0, "inner": {"size": 1, "kind": "a"}, "shape": (1, 2), "note": None}
    with pytest.raises(ConfigError, match="Outer.rte: unknown field"):
        template(Outer, {"rte": 1})


@pytest.mark.parametrize(
    "file", sorted(p.name for p in CONFIGS.glob("*.py") if p.name not in ("__init__.py", "schema.py"))
)
def test_named_configs_build(file):
    spec = importlib.util.spec_from_file_location("named", CONFIGS / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for stage in ("world", "action"):
        assert build(TrainConfig, module.get_config(stage).to_dict()).stage == stage
