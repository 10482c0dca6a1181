"""Strict configs: frozen pydantic dataclasses, and the one way from flags and JSON files to them.

A config class stands beside what it configures and is declared with `config`; every number has a range, every field
a description (`--help` prints them), and anything wrong is a `ConfigError` of one line that names the field as the
flag has it, its value and what is allowed:

    @config
    class LossConfig:
        \"\"\"Of one loss.\"\"\"
        weight: Positive = Field(1.0, description="of the loss")

A config file (`experiments/configs/*.py`) returns the `template` of such a class as an `ml_collections.ConfigDict`;
`build` turns the ConfigDict, or what a JSON file holds, into the class.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from ml_collections import ConfigDict, config_dict
from pydantic import Field

T = TypeVar("T")

# Ranges. No integer leaves 32 bits and no number is NaN or infinite: what is larger is a slip of the keyboard.
LARGEST = 2**31 - 1
Count = Annotated[int, Field(ge=0, le=LARGEST)]
PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Number = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]  # [0, 1]
Inside = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]  # (0, 1)
Below1 = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]  # [0, 1)
Path = Annotated[str, Field(min_length=1, max_length=4096)]
Text = Annotated[str, Field(max_length=65536)]


class ConfigError(ValueError):
    """A field with a value that is not allowed. The message is one line for the user."""


def require(ok: bool, field: str, value: Any, allowed: str) -> None:
    """Raises ConfigError naming the field, its value and what is allowed unless `ok`."""
    if not ok:
        raise ConfigError(f"{field} = {_shown(value)}: {allowed}")


@typing.dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def config(cls: type[T]) -> type[T]:
    """Makes a frozen, strictly typed dataclass that refuses a wrong value with a ConfigError.

    `__post_init__` checks combinations of fields with `require`, by their bare names: a surrounding config, or the
    flag, puts its own path before them.
    """
    made = pydantic.dataclasses.dataclass(
        cls, frozen=True, config=pydantic.ConfigDict(extra="forbid", strict=True, validate_default=False)
    )
    validated = made.__init__

    def __init__(self, *args, **kwargs):
        try:
            validated(self, *args, **kwargs)
        except pydantic.ValidationError as error:
            raise _one_line(error, made, kwargs, "") from None

    made.__init__ = __init__
    return made


def build(kind: type[T], values: Mapping[str, Any], path: str = "config") -> T:
    """Builds the config class `kind` from a mapping; nested groups become nested configs, lists tuples.

    Args:
      path: what stands before the names of fields in errors; `config` as in the flag --config.FIELD.

    Raises:
      ConfigError: unknown or missing field, wrong type or range, or a combination that `kind` refuses.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} = {_shown(values)}: must be a group of fields")
    try:
        return pydantic.TypeAdapter(kind).validate_json(json.dumps(values))
    except pydantic.ValidationError as error:
        raise _one_line(error, kind, values, path) from None
    except (TypeError, ValueError, RecursionError) as error:  # what JSON cannot say
        raise ConfigError(f"{path}: {error}") from None


def _one_line(error: pydantic.ValidationError, kind: type, values: Any, path: str) -> ConfigError:
    """The first thing that pydantic found, as our line."""
    first = error.errors(include_url=False)[0]
    # A location also names the member of a union that was tried: such names are not in the values.
    place, at, value = path, kind, values
    for i, key in enumerate(first["loc"]):
        inside = isinstance(value, Mapping) and key in value or isinstance(value, (list, tuple))
        if not inside and i + 1 < len(first["loc"]) and isinstance(value, Mapping):
            at = _member(at, key)
            continue
        if isinstance(key, int):
            place, at = f"{place}[{key}]", next(iter(typing.get_args(_bare(at))), None)
            value = value[key] if inside and key < len(value) else None
        else:
            place, at = f"{place}.{key}" if place else key, _member(at, key)
            value = value.get(key) if isinstance(value, Mapping) else None
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return ConfigError(f"{place}.{cause}" if place else str(cause))
    if first["type"] in ("missing", "missing_argument"):
        return ConfigError(f"{place}: missing; it has no default")
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        owner = _owner(kind, first["loc"][:-1], values)
        return ConfigError(f"{place}: unknown field; allowed: {', '.join(sorted(fields_of(owner)))}")
    if first["type"] == "union_tag_invalid":
        kind = value.get("kind") if isinstance(value, Mapping) else None
        return ConfigError(f"{place}.kind = {_shown(kind)}: must be one of {first['ctx']['expected_tags']}")
    said = first["msg"].replace("Input should be", "must be").replace("Input should", "must")
    said = said.replace("a valid integer", "an integer").replace("a valid number", "a number")
    said = said.replace("a valid string", "a text").replace("an instance of", "a group of fields,")
    said = said.replace("a dictionary or an instance", "a group of fields, an instance")
    said = said.replace("an object", "a group of fields")
    return ConfigError(f"{place} = {_shown(first['input'])}: {said[0].lower()}{said[1:]}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _bare(kind: Any) -> Any:
    """A type without Annotated and without `| None`."""
    if typing.get_origin(kind) is Annotated:
        return _bare(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        rest = [a for a in typing.get_args(kind) if a is not type(None)]
        return _bare(rest[0]) if len(rest) == 1 else kind
    return kind


def is_config(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind) and hasattr(kind, "__pydantic_fields__")


def fields_of(kind: Any) -> dict[str, pydantic.fields.FieldInfo]:
    """Fields of a config class by name; none of anything else."""
    return kind.__pydantic_fields__ if is_config(kind) else {}


def members_of(kind: Any) -> tuple[Any, ...]:
    """The config classes that a field may hold: one, or those of a union."""
    kind = _bare(kind)
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return tuple(k for k in map(_bare, typing.get_args(kind) if union else (kind,)) if is_config(k))


def _member(kind: Any, name: Any) -> Any:
    """The type below a type: of a field, of a dictionary's values, or the config of a union whose `kind` it is."""
    kind = _bare(kind)
    if typing.get_origin(kind) is dict:
        return typing.get_args(kind)[1]
    for member in members_of(kind):
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            tag = fields_of(member).get("kind")
            if name == member.__name__ or tag is not None and tag.default == name:
                return member
        if name in fields_of(member):
            return fields_of(member)[name].annotation
    return None


def _owner(kind: Any, place: tuple, values: Any) -> Any:
    """The config class at a location of an error."""
    for key in place:
        kind = (
            _member(kind, key) if not isinstance(key, int) else next(iter(typing.get_args(_bare(kind))), None)
        )
    return next(iter(members_of(kind)), kind)


def _default(field: pydantic.fields.FieldInfo) -> Any:
    """A field's default, or MISSING."""
    return dataclasses.MISSING if field.is_required() else field.get_default(call_default_factory=True)


def template(kind: type, values: Mapping[str, Any]) -> ConfigDict:
    """A ConfigDict with every field of the config class `kind`: `values`, and the defaults of all others.

    Config files return it, so that any field can be overridden on the command line, and no other. Of a field that
    may hold one of several configs, `values` says which by its `kind`.

    Raises:
      ConfigError: a name in `values` that is no field.
    """
    fields = fields_of(kind)
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(
            f"{kind.__name__}.{unknown[0]}: unknown field; allowed: {', '.join(sorted(fields))}"
        )
    made = {}
    for name, field in fields.items():
        value = values.get(name, _default(field))
        bare = _bare(field.annotation)
        if dataclasses.is_dataclass(value):
            value = dataclasses.asdict(value)
        if value is dataclasses.MISSING:
            if len(members_of(bare)) == 1 and name not in values:
                made[name] = template(bare, {})
            continue
        if value is None:
            simple = bare if isinstance(bare, type) and not is_config(bare) else object
            simple = typing.get_origin(bare) if typing.get_origin(bare) in (tuple, dict) else simple
            simple = str if typing.get_origin(bare) is Literal else simple
            made[name] = config_dict.placeholder(simple)
        elif members_of(bare) and isinstance(value, Mapping):
            given = value.get("kind")
            chosen = [m for m in members_of(bare) if given is None or fields_of(m)["kind"].default == given]
            made[name] = template((chosen or members_of(bare))[0], value)
        elif typing.get_origin(bare) is dict and isinstance(value, Mapping):
            inner = members_of(typing.get_args(bare)[1])
            made[name] = ConfigDict(
                {k: template(inner[0], _as_dict(v)) if inner else v for k, v in value.items()}
            )
        else:
            made[name] = value
    return ConfigDict(made)


def _as_dict(value: Any) -> Mapping[str, Any]:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


@dataclasses.dataclass(frozen=True)
class Row:
    """One field for `--help`: its path, type with range, default and description."""

    path: str
    kind: str
    default: str
    description: str


def flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a config's dictionary, by their paths as flags have them: `curriculum[0].batch`."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{path}{name}.")
        elif isinstance(value, tuple) and all(isinstance(part, Mapping) for part in value):
            for index, part in enumerate(value):
                yield from flat(part, f"{path}{name}[{index}].")
        else:
            yield f"{path}{name}", value


def rows(kind: type, path: str = "config") -> Iterator[Row]:
    """Every field of a config class and of those inside it, in order."""
    for name, field in fields_of(kind).items():
        place, members, bare = f"{path}.{name}", members_of(field.annotation), _bare(field.annotation)
        if typing.get_origin(bare) is dict and members_of(typing.get_args(bare)[1]):
            place, members = f"{place}.NAME", members_of(typing.get_args(bare)[1])
        default = _default(field)
        shown = "required" if default is dataclasses.MISSING else repr(default)
        if not members:
            yield Row(place, _range(field), shown, field.description or "")
        for member in members:
            yield Row(place, member.__name__, "" if default is not None else "None", field.description or "")
            yield from rows(member, place)


def _range(field: pydantic.fields.FieldInfo) -> str:
    """A type and its range in words: `int > 0`, `float in [0, 1]`, `one of 'a', 'b'`."""
    bare = _bare(field.annotation)
    if typing.get_origin(bare) is Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(bare))
    name = (
        bare.__name__
        if isinstance(bare, type) and not typing.get_args(bare)
        else str(bare).replace("typing.", "")
    )
    if typing.get_origin(bare) is tuple:
        return "tuple"
    limits = {}
    for item in field.metadata:
        for limit in ("ge", "gt", "le", "lt"):
            if getattr(item, limit, None) is not None:
                limits[limit] = getattr(item, limit)
    low = f" > {limits['gt']:g}" if "gt" in limits else f" >= {limits['ge']:g}" if "ge" in limits else ""
    small = lambda v: v < 1e9 and not math.isclose(v, LARGEST)
    high = f" < {limits['lt']:g}" if "lt" in limits else ""
    high = f" <= {limits['le']:g}" if "le" in limits and small(limits["le"]) else high
    return f"{name}{low}{high}"
