"""Checkpoint folders: which networks there are, and their configs, strictly from `config.json`.

What a folder is, is read from file names and from `_class_name` in `config.json`, never from tensor shapes:

    published     high_noise_model/ and low_noise_model/ (or one folder of any name: the fast model), each
                  with config.json (WanModel, WanModelFast); Wan2.1_VAE.pth; models_t5_umt5-xxl-enc-bf16.pth;
                  google/umt5-xxl/tokenizer.json
    diffusers     transformer/ and transformer_2/ (WanTransformer3DModel), vae/ (AutoencoderKLWan),
                  text_encoder/ (UMT5EncoderModel), tokenizer/tokenizer.json

A `.safetensors` file of the same name is read in place of a `.pth`. A folder of one network is read as well.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from lingbot_jax.config import ConfigError, require
from lingbot_jax.control.plucker import CONTROL_CHANNELS, Control
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.convert import names_dit, names_text, names_vae
from lingbot_jax.convert.names import Entry, Slot, expand
from lingbot_jax.convert.read import Safetensors, Source, TorchFile, open_safetensors, read_json
from lingbot_jax.models import params
from lingbot_jax.models.dit import WorldDiT
from lingbot_jax.models.config import UMT5Config
from lingbot_jax.models.text import UMT5
from lingbot_jax.models.config import VAEConfig
from lingbot_jax.models.vae import WanVAE

NetworkConfig = DiTConfig | VAEConfig | UMT5Config
MODULES = {DiTConfig: WorldDiT, VAEConfig: WanVAE, UMT5Config: UMT5}
VAE_FILE = "Wan2.1_VAE"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16"
TOKENIZER_FILES = ("google/umt5-xxl/tokenizer.json", "tokenizer/tokenizer.json")
EXPERTS = {
    "high_noise_model": "high",
    "low_noise_model": "low",
    "transformer": "high",
    "transformer_2": "low",
}


@dataclasses.dataclass(frozen=True)
class Network:
    """One network of a checkpoint.

    Attributes:
      name: `high`, `low`, `world`, `vae` or `text`. layout: whose names the source has.
      config: ours. table: names of its tensors. source: where they are.
    """

    name: str
    layout: str
    config: NetworkConfig
    table: list[Entry]
    source: Source

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of our parameters by dotted path; nothing is allocated."""
        return parameter_shapes(self.config)

    def slots(self) -> dict[str, Slot]:
        return expand(self.table, self.shapes())


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Attributes:
    networks: what was found. tokenizer: its file, if there is one. fast: one causal transformer.
    others: folders with networks of other classes, which are left out.
    """

    networks: list[Network]
    tokenizer: pathlib.Path | None
    fast: bool
    others: list[str]


def parameter_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a network by dotted path; nothing is allocated."""
    template = params.abstract(lambda key: MODULES[type(config)](config, key))
    return {path: tuple(leaf.shape) for path, leaf in params.flat_params(template).items()}


def find(
    folder: str | pathlib.Path,
    control: Control | None = None,
    vae: VAEConfig | None = None,
    text: UMT5Config | None = None,
) -> Checkpoint:
    """Finds the networks of a folder; opens their files, reads no tensors.

    Args:
      control: control channels of the transformers; None: as their config.json says.
      vae, text: sizes of the two published files that have no config.json; None: the published ones.

    Raises:
      ConfigError: nothing there that is known, or a config that we cannot represent.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"source = {str(folder)!r}: no such folder")
    places = [folder, *sorted(p for p in folder.iterdir() if p.is_dir())]
    configs = {p: read_json(p / "config.json") for p in places if (p / "config.json").is_file()}
    networks, others = [], []
    for place, values in configs.items():
        kind = _class(values)
        if kind in READERS:
            name, config, table = READERS[kind](values, place, control)
            networks.append(
                Network(
                    name, "published" if kind in WAN_CLASSES else kind, config, table, open_safetensors(place)
                )
            )
        elif place is folder:
            raise ConfigError(f"{place}/config.json: _class_name = {kind!r}: known are {', '.join(READERS)}")
        else:
            others.append(f"{place.name} ({kind})")
    networks = _named(networks)
    for name, stem, config, table in (
        ("vae", VAE_FILE, vae or VAEConfig(), names_vae.published),
        ("text", TEXT_FILE, text or UMT5Config(), lambda _: names_text.published()),
    ):
        source = _file(folder, stem)
        if source and all(network.name != name for network in networks):
            networks.append(Network(name, "published", config, table(config), source))
    if not networks:
        raise ConfigError(
            f"source = {str(folder)!r}: no checkpoint there; expected high_noise_model/, low_noise_model/, "
            f"{VAE_FILE}.pth (published), or transformer/, vae/ (diffusers)"
        )
    tokenizer = next((folder / f for f in TOKENIZER_FILES if (folder / f).is_file()), None)
    fast = any(_class(v) == "WanModelFast" for v in configs.values()) or any(
        network.name == "world" for network in networks
    )
    return Checkpoint(networks, tokenizer, fast, others)


def _class(values: Mapping[str, Any]) -> str:
    """The class a config.json is of: diffusers writes `_class_name`, transformers `architectures`."""
    architectures = values.get("architectures") or [None]
    return values.get("_class_name") or architectures[0] or "none"


def _named(networks: list[Network]) -> list[Network]:
    """A transformer without a partner is `world`; experts keep the name of their folder."""
    transformers = [n for n in networks if isinstance(n.config, DiTConfig)]
    if len(transformers) == 1 and transformers[0].name not in ("high", "low"):
        transformers[0] = dataclasses.replace(transformers[0], name="world")
    names = sorted(n.name for n in transformers)
    if len(transformers) > 1 and names != ["high", "low"]:
        raise ConfigError(
            f"{len(transformers)} transformer folders named {names}: expected high_noise_model/ and "
            "low_noise_model/, or transformer/ and transformer_2/, or a single one"
        )
    return transformers + [n for n in networks if not isinstance(n.config, DiTConfig)]


def _file(folder: pathlib.Path, stem: str) -> Source | None:
    """The published file of that name, if there is one."""
    if (folder / f"{stem}.safetensors").is_file():
        return Safetensors([folder / f"{stem}.safetensors"])
    if (folder / f"{stem}.pth").is_file():
        return TorchFile(folder / f"{stem}.pth")
    return None


class _Fields:
    """Reads a config.json strictly: every key must be asked for, and fixed ones must have their value."""

    def __init__(self, values: Mapping[str, Any], place: pathlib.Path):
        self._values = dict(values)
        self._place = place
        for name in ("_class_name", "_diffusers_version", "_name_or_path"):
            self._values.pop(name, None)

    def take(self, name: str, kind: type, *default: Any) -> Any:
        """The value of a key, or the published default where there is one."""
        if name not in self._values and default:
            return default[0]
        value = self._values.pop(name, None)
        ok = isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool))
        require(ok, f"{self._place}/config.json: {name}", value, f"must be {kind.__name__}")
        return value

    def fixed(self, name: str, *allowed: Any) -> None:
        """Keys that we support one value of; the first is the default."""
        value = self._values.pop(name, allowed[0])
        require(
            value in allowed, f"{self._place}/config.json: {name}", value, f"only {allowed[0]!r} is known"
        )

    def done(self) -> None:
        unknown = sorted(self._values)
        require(not unknown, f"{self._place}/config.json", unknown, "fields that we do not know")


def _wan(values: Mapping[str, Any], place: pathlib.Path, control: Control | None):
    """A published WanModel. Key defaults are those of the published constructor."""
    fields = _Fields(values, place)
    kind = fields.take("model_type", str)
    require(kind in ("i2v", "t2v"), f"{place}/config.json: model_type", kind, "must be 'i2v' or 't2v'")
    channels, inputs = fields.take("out_dim", int), fields.take("in_dim", int)
    _check_channels(kind == "i2v", channels, inputs, f"{place}/config.json: in_dim")
    fields.fixed("window_size", [-1, -1])
    fields.fixed("qk_norm", True)
    fields.fixed("cross_attn_norm", True)
    for name in ("local_attn_size", "sink_size"):  # the rollout's, not the network's
        fields.take(name, int, 0)
    stated, cameras = fields.take("control_type", object, None), fields.take("cam_channels", object, None)
    if cameras is not None:
        stated = {n: name for name, n in CONTROL_CHANNELS.items()}.get(cameras, f"{cameras} channels")
    chosen = control or stated or (None if _has_control(place) else "none")
    allowed = f"choose with --control, one of {', '.join(CONTROL_CHANNELS)} (base-cam: cam, base-act: act)"
    require(chosen in CONTROL_CHANNELS, f"{place}/config.json: control_type", chosen, allowed)
    config = DiTConfig(
        dim=fields.take("dim", int),
        layers=fields.take("num_layers", int),
        heads=fields.take("num_heads", int),
        ffn=fields.take("ffn_dim", int),
        freq_dim=fields.take("freq_dim", int, 256),
        text_dim=fields.take("text_dim", int, 4096),
        text_len=fields.take("text_len", int, 512),
        latent_channels=channels,
        image_condition=kind == "i2v",
        mask_channels=inputs - 2 * channels if kind == "i2v" else 4,
        control=chosen,
        patch=tuple(fields.take("patch_size", list, [1, 2, 2])),
        eps=fields.take("eps", float, 1e-6),
    )
    fields.done()
    return EXPERTS.get(place.name, "world"), config, names_dit.dit_table(config)


def _check_channels(conditioned: bool, latent: int, inputs: int, field: str) -> None:
    """Inputs are the noisy latent, and for image-to-video a mask and a conditioning latent."""
    allowed = f"must be more than 2 x {latent} for image-to-video" if conditioned else f"must be {latent}"
    require(inputs > 2 * latent if conditioned else inputs == latent, field, inputs, allowed)


def _has_control(place: pathlib.Path) -> bool:
    """Whether the published names of control layers occur: LingBot-World's class has them, Wan's has not."""
    return "patch_embedding_wancamctrl.weight" in open_safetensors(place).tensors


def _diffusers_wan(values: Mapping[str, Any], place: pathlib.Path, control: Control | None):
    """diffusers' WanTransformer3DModel. It has no control layers."""
    require(control in (None, "none"), "control", control, "a diffusers transformer has no control layers")
    fields = _Fields(values, place)
    channels, inputs = fields.take("out_channels", int), fields.take("in_channels", int)
    heads, head_dim = fields.take("num_attention_heads", int), fields.take("attention_head_dim", int)
    fields.fixed("cross_attn_norm", True)
    fields.fixed("qk_norm", "rms_norm_across_heads")
    for name in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
        fields.fixed(name, None)
    fields.take("rope_max_seq_len", int, 1024)  # our tables are made for the positions in use
    conditioned = inputs != channels
    _check_channels(conditioned, channels, inputs, f"{place}/config.json: in_channels")
    config = DiTConfig(
        dim=heads * head_dim,
        layers=fields.take("num_layers", int),
        heads=heads,
        ffn=fields.take("ffn_dim", int),
        freq_dim=fields.take("freq_dim", int, 256),
        text_dim=fields.take("text_dim", int, 4096),
        latent_channels=channels,
        image_condition=conditioned,
        mask_channels=inputs - 2 * channels if conditioned else 4,
        control="none",
        patch=tuple(fields.take("patch_size", list, [1, 2, 2])),
        eps=fields.take("eps", float, 1e-6),
    )
    fields.done()
    return EXPERTS.get(place.name, "world"), config, names_dit.diffusers_dit_table(config)


def _diffusers_vae(values: Mapping[str, Any], place: pathlib.Path, _: Control | None):
    """diffusers' AutoencoderKLWan, as of Wan 2.1."""
    fields = _Fields(values, place)
    width = fields.take("base_dim", int, 96)
    fields.fixed("decoder_base_dim", None, width)
    fields.fixed("attn_scales", [])
    fields.fixed("dropout", 0.0)
    fields.fixed("is_residual", False)
    fields.fixed("in_channels", 3)
    fields.fixed("out_channels", 3)
    fields.fixed("patch_size", None)
    fields.fixed("clip_output", True)
    published = VAEConfig()
    config = VAEConfig(
        width=width,
        mults=tuple(fields.take("dim_mult", list, list(published.mults))),
        blocks=fields.take("num_res_blocks", int, published.blocks),
        time_strides=tuple(fields.take("temperal_downsample", list, list(published.time_strides))),
        channels=fields.take("z_dim", int, published.channels),
        mean=tuple(fields.take("latents_mean", list, list(published.mean))),
        std=tuple(fields.take("latents_std", list, list(published.std))),
    )
    fields.fixed("scale_factor_temporal", config.stride[0])
    fields.fixed("scale_factor_spatial", config.stride[1])
    fields.done()
    return "vae", config, names_vae.diffusers(config)


def _transformers_umt5(values: Mapping[str, Any], place: pathlib.Path, _: Control | None):
    """transformers' UMT5EncoderModel. Its config.json has many keys for other uses: those are left alone."""
    fields = _Fields(values, place)
    fields.fixed("feed_forward_proj", "gated-gelu")
    config = UMT5Config(
        vocab=fields.take("vocab_size", int),
        dim=fields.take("d_model", int),
        heads=fields.take("num_heads", int),
        head_dim=fields.take("d_kv", int),
        ffn=fields.take("d_ff", int),
        layers=fields.take("num_layers", int),
        buckets=fields.take("relative_attention_num_buckets", int, 32),
        max_distance=fields.take("relative_attention_max_distance", int, 128),
        eps=fields.take("layer_norm_epsilon", float, 1e-6),
    )
    return "text", config, names_text.transformers()


WAN_CLASSES = ("WanModel", "WanModelFast")
READERS = {
    **{name: _wan for name in WAN_CLASSES},
    "WanTransformer3DModel": _diffusers_wan,
    "AutoencoderKLWan": _diffusers_vae,
    "UMT5EncoderModel": _transformers_umt5,
}
