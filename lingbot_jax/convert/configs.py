"""Configs of networks, strictly from their `config.json`; of the two published files that have none, from tensors.

Errors name the fields as config.json has them.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from lingbot_jax.config import ConfigError, build, require
from lingbot_jax.control.plucker import CONTROL_CHANNELS, Control
from lingbot_jax.convert.read import Source
from lingbot_jax.models.config import DiTConfig, UMT5Config, VAEConfig

T = TypeVar("T")

# Our fields and those of config.json; one that config.json leaves out has the published default, which is ours.
WAN = {
    "dim": "dim",
    "layers": "num_layers",
    "heads": "num_heads",
    "ffn": "ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "text_len": "text_len",
    "patch": "patch_size",
    "eps": "eps",
}
DIFFUSERS_WAN = {
    "layers": "num_layers",
    "heads": "num_attention_heads",
    "ffn": "ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "patch": "patch_size",
    "eps": "eps",
}
DIFFUSERS_VAE = {
    "width": "base_dim",
    "mults": "dim_mult",
    "blocks": "num_res_blocks",
    "time_strides": "temperal_downsample",
    "channels": "z_dim",
    "mean": "latents_mean",
    "std": "latents_std",
}
TRANSFORMERS_UMT5 = {
    "vocab": "vocab_size",
    "dim": "d_model",
    "heads": "num_heads",
    "head_dim": "d_kv",
    "ffn": "d_ff",
    "layers": "num_layers",
    "buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "eps": "layer_norm_epsilon",
}
CONTROL_PATCH = "patch_embedding_wancamctrl.weight"  # LingBot-World's class has it, Wan's has not


class Fields:
    """A config.json, read strictly: every key must be asked for, and fixed ones must have their value."""

    def __init__(self, values: Mapping[str, Any], place: pathlib.Path):
        self._values = dict(values)
        self.place = f"{place}/config.json"
        for name in ("_class_name", "_diffusers_version", "_name_or_path"):
            self._values.pop(name, None)

    def named(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Those of the fields that are there, under our names."""
        return {ours: self._values.pop(theirs) for ours, theirs in names.items() if theirs in self._values}

    def take(self, name: str, default: Any = None) -> Any:
        return self._values.pop(name, default)

    def whole(self, name: str, default: Any = None) -> int:
        """A positive integer."""
        value = self.take(name, default)
        ok = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 2**20
        require(ok, f"{self.place}: {name}", value, "must be an integer in 1..2^20")
        return value

    def fixed(self, name: str, *allowed: Any) -> None:
        """A key that we support one value of; the first is the default."""
        value = self._values.pop(name, allowed[0])
        require(value in allowed, f"{self.place}: {name}", value, f"only {allowed[0]!r} is known")

    def done(self) -> None:
        unknown = sorted(self._values)
        require(not unknown, self.place, unknown, "fields that we do not know")

    def build(self, kind: type[T], values: Mapping[str, Any], names: Mapping[str, str]) -> T:
        return _build(kind, values, self.place, names)


def _build(kind: type[T], values: Mapping[str, Any], place: str, names: Mapping[str, str] | None = None) -> T:
    """The config class, or an error that names the field as `place` has it."""
    try:
        return build(kind, values, "@")
    except ConfigError as error:
        theirs = lambda match: f"{place}: {(names or {}).get(match[1], match[1])}"
        raise ConfigError(re.sub(r"^@\.(\w+)", theirs, str(error), count=1)) from None


def text_len(values: Mapping[str, Any], place: pathlib.Path) -> int:
    """Tokens per text; diffusers does not say it."""
    return Fields(values, place).whole("text_len", UMT5Config().length)


def wan(
    values: Mapping[str, Any], place: pathlib.Path, source: Source, stride: int, control: Control | None
) -> tuple[DiTConfig, tuple[int, int]]:
    """A published WanModel and its rollout's (window, sink).

    Args:
      stride: pixels per latent pixel of the codec that it is used with.
      control: what its camera embedding holds, where config.json does not say it and the width fits several.
    """
    fields = Fields(values, place)
    kind = fields.take("model_type")
    require(kind in ("i2v", "t2v"), f"{fields.place}: model_type", kind, "must be 'i2v' or 't2v'")
    channels, inputs = fields.whole("out_dim"), fields.whole("in_dim")
    conditioned = kind == "i2v"
    _check_channels(conditioned, channels, inputs, f"{fields.place}: in_dim")
    fields.fixed("window_size", [-1, -1])
    fields.fixed("qk_norm", True)
    fields.fixed("cross_attn_norm", True)
    rollout = fields.take("local_attn_size", -1), fields.take("sink_size", 0)
    stated, cameras = fields.take("control_type"), fields.take("cam_channels")
    if cameras is not None:
        stated = next((name for name, n in CONTROL_CHANNELS.items() if n == cameras), f"{cameras} channels")
    ours = fields.named(WAN)
    fields.done()
    ours |= {"latent_channels": channels, "image_condition": conditioned, "spatial_stride": stride}
    ours |= {"mask_channels": inputs - 2 * channels} if conditioned else {}
    config = fields.build(DiTConfig, ours | {"control": "none"}, WAN)
    chosen = control or stated or _control_of(source, config)
    allowed = f"choose with --control, one of {', '.join(CONTROL_CHANNELS)} (base-cam: cam, base-act: act)"
    require(chosen in tuple(CONTROL_CHANNELS), f"{fields.place}: control_type", chosen, allowed)
    return dataclasses.replace(config, control=chosen), rollout


def _check_channels(conditioned: bool, latent: int, inputs: int, field: str) -> None:
    """Inputs are the noisy latent, and for image-to-video a mask and a conditioning latent."""
    allowed = f"must be more than 2 x {latent} for image-to-video" if conditioned else f"must be {latent}"
    require(inputs > 2 * latent if conditioned else inputs == latent, field, inputs, allowed)


def _control_of(source: Source, config: DiTConfig) -> str | None:
    """What the camera embedding holds, from the width of its layer; None where no kind of ours has that width."""
    if CONTROL_PATCH not in source.tensors:
        return "none"
    area = config.spatial_stride**2 * config.patch[1] * config.patch[2]
    widths = {n * area: name for name, n in CONTROL_CHANNELS.items() if n}
    return widths.get(tensor_size(source, CONTROL_PATCH, 1))


def diffusers_wan(values: Mapping[str, Any], place: pathlib.Path, stride: int, text_len: int) -> DiTConfig:
    """diffusers' WanTransformer3DModel. It has no control layers, and does not say the length of its texts."""
    fields = Fields(values, place)
    inputs = fields.whole("in_channels", 16)
    channels = fields.whole("out_channels", inputs)
    fields.fixed("cross_attn_norm", True)
    fields.fixed("qk_norm", "rms_norm_across_heads")
    for name in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
        fields.fixed(name, None)
    fields.whole("rope_max_seq_len", 1024)  # our tables are made for the positions in use
    conditioned = inputs != channels
    _check_channels(conditioned, channels, inputs, f"{fields.place}: in_channels")
    head_dim, ours = fields.whole("attention_head_dim", 128), fields.named(DIFFUSERS_WAN)
    heads = ours.get("heads", 40)
    require(isinstance(heads, int), f"{fields.place}: num_attention_heads", heads, "must be an integer")
    ours |= {"dim": heads * head_dim, "heads": heads, "text_len": text_len, "latent_channels": channels}
    ours |= {"image_condition": conditioned, "spatial_stride": stride, "control": "none"}
    ours |= {"mask_channels": inputs - 2 * channels} if conditioned else {}
    fields.done()
    return fields.build(DiTConfig, ours, DIFFUSERS_WAN | {"dim": "attention_head_dim"})


def diffusers_vae(values: Mapping[str, Any], place: pathlib.Path) -> VAEConfig:
    """diffusers' AutoencoderKLWan, as of Wan 2.1."""
    fields = Fields(values, place)
    ours = fields.named(DIFFUSERS_VAE)
    fields.fixed("decoder_base_dim", None, ours.get("width"))
    fields.fixed("attn_scales", [])
    fields.fixed("dropout", 0.0)
    fields.fixed("is_residual", False)
    fields.fixed("in_channels", 3)
    fields.fixed("out_channels", 3)
    fields.fixed("patch_size", None)
    fields.fixed("clip_output", True)
    published, channels = VAEConfig(), ours.get("channels", VAEConfig().channels)
    for name in ("mean", "std"):  # the constructor's defaults are written whatever the number of channels
        if channels != published.channels and ours.get(name) == list(getattr(published, name)):
            del ours[name]
    config = fields.build(VAEConfig, _moments(channels) | ours, DIFFUSERS_VAE)
    fields.fixed("scale_factor_temporal", config.stride[0], published.stride[0])
    fields.fixed("scale_factor_spatial", config.stride[1], published.stride[1])
    fields.done()
    return config


def _moments(channels: Any) -> dict[str, list[float]]:
    """Moments of the latent where no file says them: those published, or none for another number of channels."""
    if channels == VAEConfig().channels or not isinstance(channels, int) or not 0 < channels <= 4096:
        return {}
    return {"mean": [0.0] * channels, "std": [1.0] * channels}


def transformers_umt5(values: Mapping[str, Any], place: pathlib.Path, length: int) -> UMT5Config:
    """transformers' UMT5EncoderModel. Its config.json has many keys for other uses: those are left alone."""
    fields = Fields(values, place)
    fields.fixed("feed_forward_proj", "gated-gelu")
    ours = fields.named(TRANSFORMERS_UMT5) | {"length": length}
    return fields.build(UMT5Config, ours, TRANSFORMERS_UMT5)


# --- The two published files. What we write has its config in the metadata of the file.


def published_vae(source: Source) -> VAEConfig:
    """Of `Wan2.1_VAE`: sizes from the shapes of its tensors; the moments of the latent are not in it."""
    stated = _stated(VAEConfig, source)
    if stated is not None:
        return stated
    width, channels = tensor_size(source, "encoder.conv1.weight", 0), tensor_size(source, "conv2.weight", 0)
    outputs, levels, strides, blocks, n = width, [], [], [0], 0
    while True:
        prefix = f"encoder.downsamples.{n}"
        if f"{prefix}.residual.2.weight" in source.tensors:
            outputs = tensor_size(source, f"{prefix}.residual.2.weight", 0)
            blocks[-1] += 1
        elif f"{prefix}.resample.1.weight" in source.tensors:
            levels.append(outputs)
            blocks.append(0)
            strides.append(f"{prefix}.time_conv.weight" in source.tensors)
        else:
            break
        n += 1
    mults = [size // max(width, 1) for size in (*levels, outputs)]
    sizes = {"width": width, "mults": mults, "blocks": blocks[0], "time_strides": strides}
    return _build(VAEConfig, sizes | {"channels": channels} | _moments(channels), source.name)


def published_umt5(source: Source, length: int) -> UMT5Config:
    """Of `models_t5_umt5-xxl-enc-bf16`: sizes from the shapes of its tensors."""
    stated = _stated(UMT5Config, source)
    if stated is not None:
        return stated
    numbers = [re.match(r"blocks\.(\d{1,6})\.", name) for name in source.tensors]
    heads = tensor_size(source, "blocks.0.pos_embedding.embedding.weight", 1)
    sizes = {
        "vocab": tensor_size(source, "token_embedding.weight", 0),
        "dim": tensor_size(source, "token_embedding.weight", 1),
        "heads": heads,
        "head_dim": tensor_size(source, "blocks.0.attn.q.weight", 0) // max(heads, 1),
        "ffn": tensor_size(source, "blocks.0.ffn.fc1.weight", 0),
        "layers": 1 + max(int(match[1]) for match in numbers if match),
        "buckets": tensor_size(source, "blocks.0.pos_embedding.embedding.weight", 0),
        "length": length,
    }
    return _build(UMT5Config, sizes, source.name)


def _stated(kind: type[T], source: Source) -> T | None:
    """The config in the metadata of a file that we wrote; None: another's."""
    if "config" not in source.metadata:
        return None
    try:
        values = json.loads(source.metadata["config"])
    except (ValueError, RecursionError):
        raise ConfigError(f"{source.name}: its metadata has a config that is not JSON") from None
    return _build(kind, values, f"{source.name}: config")


def tensor_size(source: Source, name: str, axis: int) -> int:
    """A side of a tensor that must be there. Raises ConfigError."""
    shape = source.tensors[name].shape if name in source.tensors else ()
    if len(shape) <= axis:
        raise ConfigError(f"{source.name}: is not the published file of that name: it has no tensor {name}")
    return shape[axis]
