"""Model sizes as frozen dataclasses, and the one strict way from a ConfigDict to a dataclass.

A config file (`experiments/configs/*.py`) returns an `ml_collections.ConfigDict`; `build` turns it into a
dataclass, checks every type, and lets the dataclass check its own combinations. Everything that is wrong
is a `ConfigError` with one line that names the field, its value and what is allowed.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict, config_dict

T = TypeVar("T")

Control = Literal["none", "cam", "act", "cam_act"]
# Channels of the control tensor a pixel: ray origin 3, ray direction 3, W A S D 4 (paper section 3.3.2).
CONTROL_CHANNELS: dict[str, int] = {"none": 0, "cam": 6, "act": 7, "cam_act": 10}


class ConfigError(ValueError):
    """A field with a value that is not allowed. The message is one line for the user."""


def require(ok: bool, field: str, value: Any, allowed: str) -> None:
    """Raises ConfigError naming the field, its value and what is allowed unless `ok`."""
    if not ok:
        raise ConfigError(f"{field} = {value!r}: {allowed}")


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """One WorldDiT expert. Defaults are the published constants (docs: FACTS of the A14B model).

    Attributes:
      dim: model width D. layers: blocks. heads: attention heads; head_dim = dim // heads, even.
      ffn: feed-forward width. freq_dim: sinusoid features of the timestep, even.
      text_dim, text_len: width and (zero-padded) length of the text tokens.
      latent_channels: channels of a latent pixel (16 for the Wan 2.1 VAE).
      image_condition: if True the input is noisy latent + mask + conditioning latent, else the noisy latent.
      mask_channels: channels of the conditioning mask = the codec's temporal stride.
      spatial_stride: pixels a latent pixel, which packed control carries as channels (8: 64 per channel).
      control: which control channels there are, see CONTROL_CHANNELS.
      patch: tokens are patches of (time, height, width) latent pixels; time is 1.
      eps: of every norm. rope_theta: base of the rotary frequencies.
      dtype: compute dtype of matmuls and activations. Norms, modulation and rotary angles are float32 always.
      remat: rematerialisation policy of the scanned blocks, by name.
    """

    dim: int
    layers: int
    heads: int
    ffn: int
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    latent_channels: int = 16
    image_condition: bool = True
    mask_channels: int = 4
    spatial_stride: int = 8
    control: Control = "cam"
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    rope_theta: float = 10000.0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Literal["none", "block", "dots", "offload"] = "none"

    def __post_init__(self):
        for name in ("dim", "layers", "heads", "ffn", "freq_dim", "text_dim", "text_len", "latent_channels"):
            require(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "must be positive")
        require(
            self.dim % self.heads == 0,
            "model.heads",
            self.heads,
            f"must divide model.dim = {self.dim}",
        )
        require(
            self.head_dim % 2 == 0,
            "model.heads",
            self.heads,
            f"head_dim = dim / heads = {self.head_dim} must be even for rotary pairs",
        )
        require(
            self.head_dim >= 6, "model.heads", self.heads, f"head_dim = {self.head_dim} must be at least 6"
        )
        require(self.freq_dim % 2 == 0, "model.freq_dim", self.freq_dim, "must be even")
        require(self.patch[0] == 1, "model.patch", self.patch, "the time patch must be 1")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def in_channels(self) -> int:
        """Noisy latent, then mask and conditioning latent."""
        return self.latent_channels + (self.mask_channels + self.latent_channels) * self.image_condition

    @property
    def control_channels(self) -> int:
        """Channels of packed control a latent pixel: stride^2 pixels x C, channel outermost."""
        return CONTROL_CHANNELS[self.control] * self.spatial_stride**2


# Named sizes: Wan 2.1 1.3B geometry, and one A14B expert (two of them make LingBot-World).
W1_3B = DiTConfig(dim=1536, layers=30, heads=12, ffn=8960)
W14B = DiTConfig(dim=5120, layers=40, heads=40, ffn=13824)


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(kind))
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def _coerce(kind: Any, value: Any, field: str) -> Any:
    """Checks `value` against the annotation `kind`; ints are accepted for floats, lists for tuples."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, Mapping), field, value, f"must be a group of fields ({kind.__name__})")
        return build(kind, value, field)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        if len(kinds) == 1:
            return _coerce(kinds[0], value, field)
    if origin is Literal:
        require(value in args, field, value, f"must be {_type_name(kind)}")
        return value
    if origin is tuple:
        require(isinstance(value, (tuple, list)), field, value, "must be a tuple")
        item_kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        require(len(item_kinds) == len(value), field, value, f"must have {len(item_kinds)} items")
        return tuple(
            _coerce(k, v, f"{field}[{i}]") for i, (k, v) in enumerate(zip(item_kinds, value, strict=True))
        )
    if origin is dict:
        require(isinstance(value, Mapping), field, value, "must be a group of fields")
        return {k: _coerce(args[1], v, f"{field}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    ok = isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool))
    require(ok, field, value, f"must be {_type_name(kind)}")
    return value


def build(kind: type[T], values: Mapping[str, Any], path: str = "config") -> T:
    """Builds the dataclass `kind` from a mapping; nested groups become nested dataclasses.

    Raises:
      ConfigError: unknown or missing field, wrong type, or a combination that `kind` refuses.
    """
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"{path}.{unknown[0]}: unknown field; allowed: {', '.join(sorted(fields))}")
    made = {name: _coerce(hints[name], value, f"{path}.{name}") for name, value in values.items()}
    required = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [n for n, f in fields.items() if n not in made and (f.default, f.default_factory) == required]
    if missing:
        raise ConfigError(f"{path}.{missing[0]}: missing; it has no default")
    return kind(**made)


def template(kind: type, values: Mapping[str, Any]) -> ConfigDict:
    """A ConfigDict with every field of the dataclass `kind`: `values`, and the defaults of all others.

    Config files return it, so that any field can be overridden on the command line, and no other.
    """
    hints, made = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        hint, given = hints[field.name], values.get(field.name, dataclasses.MISSING)
        default = (
            field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        )
        if dataclasses.is_dataclass(hint):
            base = dataclasses.asdict(default) if dataclasses.is_dataclass(default) else {}
            made[field.name] = template(hint, base | ({} if given is dataclasses.MISSING else given))
        elif given is not dataclasses.MISSING:
            made[field.name] = given
        elif default is None:
            made[field.name] = config_dict.placeholder(
                next(a for a in typing.get_args(hint) if a is not type(None))
            )
        elif default is not dataclasses.MISSING:
            made[field.name] = default
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(f"{kind.__name__}.{unknown[0]}: unknown field; allowed: {', '.join(sorted(hints))}")
    return ConfigDict(made)
