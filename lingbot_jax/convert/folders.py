"""Checkpoint folders: which networks there are, and the description of the world that they make.

What a folder is, is read from file names and from `_class_name` in `config.json`:

    published     high_noise_model/ and low_noise_model/ (or one folder of any name: the fast model), each
                  with config.json (WanModel, WanModelFast); Wan2.1_VAE.pth; models_t5_umt5-xxl-enc-bf16.pth;
                  google/umt5-xxl/tokenizer.json
    diffusers     transformer/ and transformer_2/ (WanTransformer3DModel), vae/ (AutoencoderKLWan),
                  text_encoder/ (UMT5EncoderModel), tokenizer/tokenizer.json
    2.0           one network in transformers/ or transformer_causal/, its config.json there or beside them (WanXModel,
                  WanModelCausal); or shards in the folder itself, without a config.json and without codec and text
                  encoder, which `assets` has; or a diffusers copy (CausalLingBotWorldTransformer3DModel)

A `.safetensors` file of the same name is read in place of a `.pth`. A folder of one network is read as well. What a
folder does not say takes the values of the published A14B model, and how a 2.0 world is sampled those of PRESETS.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from lingbot_jax import files
from lingbot_jax.config import ConfigError, build
from lingbot_jax.control.plucker import Control
from lingbot_jax.convert import configs, names_dit, names_text, names_vae, second
from lingbot_jax.convert.names import Entry
from lingbot_jax.convert.presets import PRESETS, SECOND, SMALL
from lingbot_jax.convert.read import Safetensors, Source, TorchFile, open_safetensors
from lingbot_jax.models.config import DiTConfig, UMT5Config, VAEConfig
from lingbot_jax.worlds.config import BOUNDARY, CausalConfig, SampleConfig, WorldConfig
from lingbot_jax.worlds.world import CODEC, TEXT

VAE_FILE = "Wan2.1_VAE"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16"
TOKENIZER_FILES = ("google/umt5-xxl/tokenizer.json", "tokenizer/tokenizer.json")
FOLDERS = {"high": "high_noise_model", "low": "low_noise_model", "world": "world_model"}
WAN = ("WanModel", "WanModelFast", "WanXModel", "WanModelCausal")
DIFFUSERS_WAN, DIFFUSERS_VAE, UMT5 = "WanTransformer3DModel", "AutoencoderKLWan", "UMT5EncoderModel"
DIFFUSERS_SECOND = "CausalLingBotWorldTransformer3DModel"  # with Wan's own names of tensors
KNOWN = (*WAN, DIFFUSERS_WAN, DIFFUSERS_SECOND, DIFFUSERS_VAE, UMT5)
# Wan's published `sample_neg_prompt`, which its pipeline puts in place of an empty one.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclasses.dataclass(frozen=True)
class Network:
    """One network of a checkpoint.

    Attributes:
      name: `high`, `low`, `world`, `codec` or `text`. layout: whose names the source has.
      table: names of its tensors. source: where they are.
    """

    name: str
    layout: str
    config: DiTConfig | VAEConfig | UMT5Config
    table: list[Entry]
    source: Source


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Attributes:
    config: the world. networks: what was found. tokenizer: its file, if there is one.
    layout: `published` or `diffusers`. others: folders with networks of other classes, which are left out.
    """

    config: WorldConfig
    networks: list[Network]
    tokenizer: pathlib.Path | None
    layout: str
    others: list[str]


def find(
    folder: str | pathlib.Path,
    control: Control | None = None,
    assets: str | pathlib.Path | None = None,
    heads: int | None = None,
    preset: str | None = None,
) -> Checkpoint:
    """Finds the networks of a folder; opens their files, reads no tensors.

    Args:
      control: what the camera embedding holds; None: as config.json says, or the layer's width.
      assets: another folder, which has the codec, text encoder and tokenizer that this one lacks.
      heads: attention heads of a transformer without config.json; None: heads of 128.
      preset: how the world is sampled, a name of PRESETS; None: as the folder's layout says.

    Raises:
      ConfigError: nothing there that is known, or a config that we cannot represent.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"source = {str(folder)!r}: no such folder")
    found = _configs(folder)
    kinds = {place: _class(values) for place, values in found.items()}
    if kinds.get(folder, WAN[0]) not in KNOWN:
        raise ConfigError(
            f"{folder}/config.json: _class_name = {kinds[folder][:100]!r}: known are {', '.join(KNOWN)}"
        )
    sampled = _second(folder, found, kinds, heads)
    transformers = _transformers(folder, kinds)
    lengths = [configs.text_len(found[place], place) for place in transformers.values()]
    text_len = lengths[0] if lengths else UMT5Config().length
    encoders = [_codec(folder, found, kinds), _text(folder, found, kinds, text_len)]
    tokenizer = _tokenizer(folder)
    if assets is not None:
        codec, text, tokenizer = _assets(pathlib.Path(assets), encoders, tokenizer, text_len)
    else:
        codec, text = encoders
    stride = codec.config.stride[1] if codec else VAEConfig().stride[1]
    networks, rollouts = [], []
    for name, place in transformers.items():
        source = open_safetensors(place)
        if kinds[place] == DIFFUSERS_WAN:
            if control not in (None, "none"):
                raise ConfigError(f"control = {control!r}: a diffusers transformer has no control layers")
            config = configs.diffusers_wan(found[place], place, stride, text_len)
            if codec and not config.image_condition:  # unused then, and written nowhere
                config = dataclasses.replace(config, mask_channels=codec.config.stride[0])
            table = names_dit.diffusers_dit_table(config)
            networks.append(Network(name, "diffusers", config, table, source))
            continue
        values = found[place]
        if kinds[place] == DIFFUSERS_SECOND:
            values, sampled = second.diffusers_config(values, place, source)
        config, rollout = configs.wan(values, place, source, stride, control)
        rollouts.append(rollout)
        networks.append(Network(name, "published", config, names_dit.dit_table(config), source))
    everything = networks + [network for network in (codec, text) if network]
    if not everything:
        raise ConfigError(
            f"source = {str(folder)!r}: no checkpoint there; expected high_noise_model/, low_noise_model/, "
            f"transformers/, {VAE_FILE}.pth (published), or transformer/, vae/ (diffusers)"
        )
    fast = any(kinds[p] == "WanModelFast" for p in transformers.values())
    fast = fast or any(n.name == "world" and n.layout == "published" for n in networks)
    how = {
        "sample": _sample(folder) if networks and not fast else None,
        "causal": _causal(rollouts[0]) if fast else None,
    }
    if preset is not None:
        if preset not in PRESETS:
            raise ConfigError(f"preset = {preset!r}: must be one of {', '.join(PRESETS)}")
        how = PRESETS[preset]
    elif sampled is not None:
        how = sampled
    world = {
        "networks": {n.name: n.config for n in networks},
        "codec": codec and codec.config,
        "text": text and text.config,
        "boundary": _boundary(folder),
    }
    try:
        config = WorldConfig(**world, **how)
    except ConfigError as error:
        raise ConfigError(f"source = {str(folder)!r}: {error}") from None
    others = [f"{p.name} ({kind[:100]})" for p, kind in kinds.items() if kind not in KNOWN]
    return Checkpoint(config, everything, tokenizer, everything[0].layout, others)


def _configs(folder: pathlib.Path) -> dict[pathlib.Path, Mapping[str, Any]]:
    """Every config.json by the folder that it is of."""
    places = [folder, *sorted(p for p in folder.iterdir() if p.is_dir())]
    return {p: files.read_json(p / "config.json", "source") for p in places if (p / "config.json").is_file()}


def _second(
    folder: pathlib.Path, found: dict, kinds: dict[pathlib.Path, str], heads: int | None
) -> Mapping[str, Any] | None:
    """How a 2.0 world is sampled; None: it is not one. Adds its transformer's folder to `found` and `kinds`.

    Raises:
      ConfigError: two such transformers, or one without a config.json whose sizes its tensors do not say.
    """
    has_shards = lambda place: any(place.glob("*.safetensors"))
    places = [folder / name for name in SECOND if has_shards(folder / name)]
    if len(places) > 1:
        names = " and ".join(f"{place.name}/" for place in places)
        raise ConfigError(
            f"source = {str(folder)!r}: has {names}: two worlds; move one to a folder of its own"
        )
    if not places:
        own = kinds.keys() - {folder} or folder in kinds or not any(folder.glob("*.safetensors.index.json"))
        if own:
            return None
        places = [folder]
    (place,) = places
    if place != folder and kinds.get(folder) in WAN and place not in found:
        found[place], kinds[place] = found.pop(folder), kinds.pop(folder)
    if place not in found:
        found[place], kinds[place] = second.wan_json(open_safetensors(place), heads), "WanXModel"
    small = place == folder or found[place].get("dim") == SMALL
    return PRESETS["lingbot2-1.3b" if small and place.name != "transformer_causal" else SECOND[place.name]]


def _tokenizer(folder: pathlib.Path) -> pathlib.Path | None:
    return next((folder / f for f in TOKENIZER_FILES if (folder / f).is_file()), None)


def _assets(
    folder: pathlib.Path, encoders: list[Network | None], tokenizer: pathlib.Path | None, text_len: int
) -> tuple[Network | None, Network | None, pathlib.Path | None]:
    """Codec, text encoder and tokenizer: a folder's own, else those of `folder`."""
    if not folder.is_dir():
        raise ConfigError(f"assets = {str(folder)!r}: no such folder")
    found = _configs(folder)
    kinds = {place: _class(values) for place, values in found.items()}
    codec = encoders[0] or _codec(folder, found, kinds)
    text = encoders[1] or _text(folder, found, kinds, text_len)
    missing = [name for name, part in (("codec", codec), ("text encoder", text)) if part is None]
    if missing:
        raise ConfigError(f"assets = {str(folder)!r}: has no {' and no '.join(missing)}")
    return codec, text, tokenizer or _tokenizer(folder)


def _class(values: Mapping[str, Any]) -> str:
    """The class a config.json is of: diffusers writes `_class_name`, transformers `architectures`."""
    architectures = values.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return str(values.get("_class_name") or first or "none")


def _transformers(folder: pathlib.Path, kinds: Mapping[pathlib.Path, str]) -> dict[str, pathlib.Path]:
    """Folders of transformers by the name of the network; one without a partner, and not of an expert, is `world`."""
    experts = {FOLDERS["high"]: "high", FOLDERS["low"]: "low"}
    experts |= {"transformer": "high", "transformer_2": "low"}
    places = [place for place, kind in kinds.items() if kind in (*WAN, DIFFUSERS_WAN, DIFFUSERS_SECOND)]
    names = [experts.get(place.name, "world") for place in places]
    one = len(places) == 1 and places[0].name == "transformer"
    if one and (kinds[places[0]] == DIFFUSERS_SECOND or not _two_experts(folder)):
        names = ["world"]  # of a pipeline with one transformer
    if len(places) > 1 and sorted(names) != ["high", "low"]:
        raise ConfigError(
            f"{len(places)} transformer folders, {', '.join(p.name for p in places[:5])}: expected "
            "high_noise_model/ and low_noise_model/, or transformer/ and transformer_2/, or a single one"
        )
    return dict(zip(names, places, strict=True))


def _two_experts(folder: pathlib.Path) -> bool:
    return _index(folder).get("boundary_ratio") is not None


def _index(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    return files.read_json(path, "source") if path.is_file() else {}


def _boundary(folder: pathlib.Path) -> Any:
    given = _index(folder).get("boundary_ratio")
    return BOUNDARY if given is None else _checked(WorldConfig, "boundary", given, folder, "boundary_ratio")


def _sample(folder: pathlib.Path) -> SampleConfig:
    """As published, with the shift of the folder's scheduler if it has one."""
    path = folder / "scheduler" / "scheduler_config.json"
    values = files.read_json(path, "source") if path.is_file() else {}
    name = next((name for name in ("flow_shift", "shift") if values.get(name) is not None), None)
    shift = (
        SampleConfig().shift if name is None else _checked(SampleConfig, "shift", values[name], path, name)
    )
    return SampleConfig(shift=shift, negative_prompt=NEGATIVE_PROMPT)


def _checked(kind: type, ours: str, value: Any, place: pathlib.Path, theirs: str) -> Any:
    """A number of a file as the field of a config."""
    try:
        return getattr(build(kind, {ours: value}, "@"), ours)
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"@.{ours}", f"{place}: {theirs}", 1)) from None


def _causal(rollout: tuple[Any, Any]) -> CausalConfig:
    """As published; a config.json that limits what a chunk sees says (window, sink), in latent frames."""
    window, sink = rollout
    if window == -1:
        return CausalConfig()
    try:
        return build(CausalConfig, {"window": window, "sink": sink}, "@")
    except ConfigError as error:
        raise ConfigError(f"config.json: local_attn_size, sink_size = {window}, {sink}: {error}") from None


def _codec(folder: pathlib.Path, found: Mapping, kinds: Mapping[pathlib.Path, str]) -> Network | None:
    for place, kind in kinds.items():
        if kind == DIFFUSERS_VAE:
            config = configs.diffusers_vae(found[place], place)
            return Network(CODEC, "diffusers", config, names_vae.diffusers(config), open_safetensors(place))
    source = _file(folder, VAE_FILE)
    if source is None:
        return None
    config = configs.published_vae(source)
    return Network(CODEC, "published", config, names_vae.published(config), source)


def _text(
    folder: pathlib.Path, found: Mapping, kinds: Mapping[pathlib.Path, str], length: int
) -> Network | None:
    for place, kind in kinds.items():
        if kind == UMT5:
            config = configs.transformers_umt5(found[place], place, length)
            source = open_safetensors(place)
            only_tied = "shared.weight" not in source.tensors and names_text.TIED in source.tensors
            if not only_tied:
                source.tensors.pop(names_text.TIED, None)
            return Network(TEXT, "diffusers", config, names_text.transformers(only_tied), source)
    source = _file(folder, TEXT_FILE)
    if source is None:
        return None
    return Network(TEXT, "published", configs.published_umt5(source, length), names_text.published(), source)


def _file(folder: pathlib.Path, stem: str) -> Source | None:
    """The published file of that name, if there is one."""
    if (folder / f"{stem}.safetensors").is_file():
        return Safetensors([folder / f"{stem}.safetensors"])
    if (folder / f"{stem}.pth").is_file():
        return TorchFile(folder / f"{stem}.pth")
    return None
