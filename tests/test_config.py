"""Strict configs: one line that names the field, its value and what is allowed; and nothing gets past them."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import re
from typing import Literal

import pytest
from pydantic import Field

from experiments.configs.schema import EncodeConfig, EvaluateConfig, FitCodecConfig
from lingbot_jax.config import (
    ConfigError,
    Inside,
    Positive,
    PositiveInt,
    build,
    config,
    fields_of,
    require,
    rows,
    template,
)
from lingbot_jax.engine.collect.config import CollectConfig
from lingbot_jax.engine.curate.config import CurateConfig
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.rollout.generate import GenerateConfig
from lingbot_jax.training.config import TrainConfig

CONFIGS = pathlib.Path(__file__).parents[1] / "experiments" / "configs"


@config
class Inner:
    size: PositiveInt = Field(description="of it")
    kind: Literal["a", "b"] = Field("a", description="which")


@config
class Outer:
    rate: Positive = Field(description="of change")
    inner: Inner = Field(description="inside")
    shape: tuple[int, int] = Field((1, 2), description="of something")
    note: str | None = Field(None, description="anything")
    share: Inside = Field(0.5, description="of the whole")

    def __post_init__(self):
        require(self.shape[0] <= self.shape[1], "shape", self.shape, "must rise")


GOOD = {"rate": 1, "inner": {"size": 3}, "shape": [4, 5]}


def test_builds_nested_configs_and_widens_ints_to_floats():
    made = build(Outer, GOOD)
    assert made == Outer(rate=1.0, inner=Inner(size=3), shape=(4, 5))
    assert isinstance(made.rate, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.rate = 2.0


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"rat": 1}, "config.rat: unknown field; allowed: inner, note, rate, shape, share"),
        ({"rate": "fast"}, "config.rate = 'fast': must be a number"),
        ({"rate": 0}, "config.rate = 0: must be greater than 0"),
        ({"rate": math.inf}, "config.rate = inf: "),
        ({"inner": {"size": 2.5}}, "config.inner.size = 2.5: must be an integer"),
        ({"inner": {"size": 1, "kind": "c"}}, "config.inner.kind = 'c': must be 'a' or 'b'"),
        ({"inner": {}}, "config.inner.size: missing; it has no default"),
        ({"inner": 4}, "config.inner = 4: must be a group of fields"),
        ({"shape": (1, 2, 3)}, "config.shape = "),
        ({"shape": (3, 2)}, "config.shape = (3, 2): must rise"),
        ({"note": 3}, "config.note = 3: must be a text"),
        ({"share": 1.0}, "config.share = 1.0: must be less than 1"),
    ],
)
def test_refuses_with_one_line(change, line):
    with pytest.raises(ConfigError) as error:
        build(Outer, GOOD | change)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "field"),
    [({"heads": 5}, "heads"), ({"dim": 36, "heads": 4}, "heads"), ({"freq_dim": 63}, "freq_dim")],
)
def test_impossible_networks_are_refused(change, field):
    with pytest.raises(ConfigError, match=f"^{field}"):
        DiTConfig(**({"dim": 32, "layers": 1, "heads": 4, "ffn": 64} | change))


def test_template_shows_every_field_so_that_all_can_be_overridden():
    made = template(Outer, {"rate": 2.0, "inner": {"size": 1}})
    assert made.to_dict() == {
        "rate": 2.0,
        "inner": {"size": 1, "kind": "a"},
        "shape": (1, 2),
        "note": None,
        "share": 0.5,
    }
    with pytest.raises(ConfigError, match="Outer.rte: unknown field"):
        template(Outer, {"rte": 1})


def named(file: str):
    spec = importlib.util.spec_from_file_location("named", CONFIGS / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config


def values_of(made) -> dict:
    """A ConfigDict as JSON holds it."""
    return json.loads(json.dumps(made.to_dict()))


GENERATE = {"run": "r", "image": "i", "prompt": "p", "out": "o", "keys": "w-1"}
STARTS = {
    "curate.py": (CurateConfig, lambda: values_of(named("curate.py")())),
    "tiny.py:collect": (CollectConfig, lambda: values_of(named("tiny.py")("collect"))),
    "tiny.py:codec": (FitCodecConfig, lambda: values_of(named("tiny.py")("codec"))),
    "tiny.py:encode": (EncodeConfig, lambda: values_of(named("tiny.py")("encode"))),
    "tiny.py:world": (TrainConfig, lambda: values_of(named("tiny.py")("world"))),
    "tiny.py:action": (TrainConfig, lambda: values_of(named("tiny.py")("action"))),
    "tiny.py:causal": (TrainConfig, lambda: values_of(named("tiny.py")("causal"))),
    "tiny.py:distill": (TrainConfig, lambda: values_of(named("tiny.py")("distill"))),
    "tiny.py:evaluate": (EvaluateConfig, lambda: values_of(named("tiny.py")("evaluate"))),
    "w14b.py:world": (TrainConfig, lambda: values_of(named("w14b.py")("world"))),
    "w14b.py:action": (TrainConfig, lambda: values_of(named("w14b.py")("action"))),
    "w14b.py:causal": (TrainConfig, lambda: values_of(named("w14b.py")("causal"))),
    "w14b.py:distill": (TrainConfig, lambda: values_of(named("w14b.py")("distill"))),
    "w14b.py:evaluate": (EvaluateConfig, lambda: values_of(named("w14b.py")("evaluate"))),
    "w1_3b.py:world": (TrainConfig, lambda: values_of(named("w1_3b.py")("world"))),
    "generate": (GenerateConfig, lambda: values_of(template(GenerateConfig, GENERATE))),
}
HOSTILE = (math.nan, math.inf, -1, 0, 10**30, "")


def leaves(values, place=()):
    """Paths of all values inside dictionaries and lists; of a list also itself."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from leaves(value, (*place, key))
        return
    yield place
    if isinstance(values, list):
        for i, value in enumerate(values):
            yield from leaves(value, (*place, i))


def changed(values, place, new):
    if not place:
        return new
    made = dict(values) if isinstance(values, dict) else list(values)
    made[place[0]] = changed(values[place[0]], place[1:], new)
    return made


def shown(place) -> str:
    return "config" + "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in place)


def found(made, place):
    for key in place:
        made = made[key] if isinstance(made, (dict, tuple)) else getattr(made, key)
    return made


@pytest.mark.parametrize("name", STARTS)
def test_no_hostile_value_gets_past_a_field(name, tmp_path, monkeypatch):
    """Every field of every config: one line that names a field, or the value is there and is a finite one."""
    monkeypatch.chdir(tmp_path)
    kind, start = STARTS[name]
    values = start()
    build(kind, values)  # it is a config before anything is changed
    for place in leaves(values):
        for bad in HOSTILE:
            try:
                made = build(kind, changed(values, place, bad))
            except ConfigError as error:
                assert "\n" not in str(error) and len(str(error)) < 2000, (place, bad, error)
                # Its own name, or where fields contradict each other the name of the other.
                assert re.match(r"config(\.\w+|\[\d+\])+( = |: |, )", str(error)), (place, bad, str(error))
                alone = isinstance(bad, float) or bad == 10**30
                assert not alone or str(error).startswith(shown(place)), (place, bad, str(error))
            else:
                assert bad not in (math.inf, 10**30) and bad == bad, (place, bad)
                assert found(made, place) == bad, (place, bad)
    assert not list(tmp_path.iterdir())


def test_a_range_that_is_missing_is_seen():
    """The test above can fail: an integer without a range takes 10**30."""

    @config
    class Open:
        size: int = Field(1, description="without a range")

    assert build(Open, {"size": 10**30}).size == 10**30


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in STARTS.values()}, key=lambda k: k.__name__))
def test_help_lists_every_field_with_its_type_default_and_description(kind):
    table = list(rows(kind))
    assert {row.path.split(".")[1] for row in table} == set(fields_of(kind))
    assert not [row.path for row in table if not row.description or not row.kind]
