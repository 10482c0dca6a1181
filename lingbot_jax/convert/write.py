"""Writes what a source holds as a bundle, or as safetensors with published names.

Everything is checked before anything is written. What is written goes to a temporary folder beside the target and is
renamed when it is whole. At most one layer of one parameter is in memory (to a bundle), or one shard (to published
names), and of a run one network.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from etils import epath
from safetensors.numpy import save_file

from lingbot_jax.cards import README
from lingbot_jax.config import ConfigError, require
from lingbot_jax.convert import names_dit, names_text, names_vae
from lingbot_jax.convert.contents import Contents, Part, Read
from lingbot_jax.convert.folders import FOLDERS, TEXT_FILE, TOKENIZER_FILES, VAE_FILE
from lingbot_jax.convert.names import Entry, layers_of, part_names
from lingbot_jax.convert.presets import PRESETS, SECOND, SECOND_CLASSES
from lingbot_jax.files import is_remote, whole_folder
from lingbot_jax.models.config import DiTConfig, NgramConfig, UMT5Config, VAEConfig
from lingbot_jax.worlds import manifest, storage
from lingbot_jax.worlds.config import WorldConfig
from lingbot_jax.worlds.manifest import Starts
from lingbot_jax.worlds.open import BUNDLE, TOKENIZER, bundle_text, params_folder, write_bundle_config
from lingbot_jax.worlds.quantization import SCALE, quantize, quantized
from lingbot_jax.worlds.world import CODEC

StoredDtype = Literal["keep", "bfloat16", "float32", "int8"]
Progress = Callable[[str, int], None]  # network, bytes written since the last call
SHARD_BYTES = 4 << 30
_DTYPES: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def cast(part: Part, dtype: StoredDtype) -> Part:
    """The part as it is to be stored; reading it refuses what is not finite.

    The codec keeps its dtype: it is small, and its rounding would show in the picture.
    """
    kept = dtype == "keep" or part.name == CODEC
    if dtype == "int8" and not kept:
        stored = quantized(part.specs)
    else:
        kind = lambda spec: spec.dtype if kept else np.dtype(_DTYPES[dtype])
        stored = {p: jax.ShapeDtypeStruct(s.shape, kind(s)) for p, s in part.specs.items()}

    def start() -> Read:
        read = part.open()

        def read_cast(path: str, layer: int | None) -> np.ndarray:
            own = path.removesuffix(SCALE)
            value = read(own, layer)
            if own + SCALE in stored:
                _check_finite(value, part.name, own, layer)
                return quantize(value)[path != own]
            value = value.astype(stored[path].dtype)
            _check_finite(value, part.name, path, layer)
            return value

        return read_cast

    return dataclasses.replace(part, specs=stored, open=start)


def _check_finite(value: np.ndarray, network: str, path: str, layer: int | None) -> None:
    """Raises ConfigError for NaN and infinities: all bits of the exponent are set. (ml_dtypes' own test is slow.)"""
    words = np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}")
    exponent = np.asarray(np.inf, value.dtype).view(words.dtype)
    if (words & exponent == exponent).any():
        place = path if layer is None else f"layer {layer} of {path}"
        raise ConfigError(
            f"source: {network}: {place} holds NaN, infinities or what {value.dtype} cannot hold: it is damaged"
        )


def nbytes(specs: storage.Specs) -> int:
    return sum(int(np.prod(spec.shape)) * spec.dtype.itemsize for spec in specs.values())


def to_bundle(
    contents: Contents,
    out: epath.PathLike,
    dtype: StoredDtype = "bfloat16",
    progress: Progress = lambda name, done: None,
    starts: Starts = Starts(),  # noqa: B008 - frozen
    card: str | None = None,
) -> None:
    """Writes a bundle.

    Args:
      dtype: of the stored transformers and text encoder. starts: pictures that play can start from.
      card: its README.md, which may be edited: the manifest does not vouch for it.

    Raises:
      ConfigError: tensors do not fit, or one is not finite; or `out` exists, or the disk is too small. Nothing is left
        behind then.
    """
    contents.check()
    parts = [cast(part, dtype) for part in contents.parts]
    with whole_folder(out, sum(nbytes(part.specs) for part in parts)) as folder:
        for part in parts:
            target = params_folder(folder, part.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            writer, read = storage.Writer(target, part.specs), part.open()
            for path, layer in part.units():
                value = read(path, layer)
                writer.write(path, layer, value)
                progress(part.name, value.nbytes)
            writer.close()
        described = {BUNDLE: bundle_text(contents.config).encode()}
        if contents.tokenizer is not None:
            described[TOKENIZER] = contents.tokenizer.read_bytes()
            (folder / TOKENIZER).write_bytes(described[TOKENIZER])
        if card is not None:
            (folder / README).write_text(card)
        manifest.write(folder, described, starts)
        write_bundle_config(folder, contents.config)  # last: it makes the folder a bundle


def to_published(
    contents: Contents,
    out: epath.PathLike,
    dtype: StoredDtype = "keep",
    progress: Progress = lambda name, done: None,
    card: str | None = None,
) -> None:
    """Writes a folder with the published names; safetensors in place of `.pth`.

    Sizes of codec and text encoder, which the published layout has no place for, go into their files' metadata.

    Args:
      card: its README.md.

    Raises:
      ConfigError: see `to_bundle`; or the world cannot be said in published terms.
    """
    contents.check()
    require(dtype != "int8", "dtype", dtype, "only of a bundle: published names have no place for scales")
    require(not is_remote(out), "out", str(out), "published folders are written to a disk")
    if isinstance(contents.config.text, NgramConfig):
        raise ConfigError(
            f"source = {contents.path!r}: its text is 'ngram', and published folders know only umT5"
        )
    written = [(cast(part, dtype), *_published(part, contents)) for part in contents.parts]
    with whole_folder(out, sum(nbytes(part.specs) for part, *_ in written)) as target:
        folder = pathlib.Path(target)
        if card is not None:
            (folder / README).write_text(card)
        for part, place, table, values in written:
            tick = lambda done, name=part.name: progress(name, done)
            if isinstance(part.config, DiTConfig):
                (folder / place).mkdir()
                (folder / place / "config.json").write_text(json.dumps(values, indent=2) + "\n")
                _shards(folder / place / "diffusion_pytorch_model", table, part, {}, tick, SHARD_BYTES)
            else:
                _shards(folder / place, table, part, {"config": json.dumps(values)}, tick, None)
        if contents.tokenizer is not None:
            tokenizer = folder / TOKENIZER_FILES[0]
            tokenizer.parent.mkdir(parents=True)
            tokenizer.write_bytes(contents.tokenizer.read_bytes())


def _published(part: Part, contents: Contents) -> tuple[str, list[Entry], dict[str, Any]]:
    """Where a part goes, under which names, and what its config.json or its metadata says. Raises ConfigError."""
    if isinstance(part.config, DiTConfig):
        place, kind = _place(part.name, contents.config)
        return place, names_dit.dit_table(part.config), wan_json(part.config, kind)
    if isinstance(part.config, VAEConfig):
        return VAE_FILE, names_vae.published(part.config), dataclasses.asdict(part.config)
    if isinstance(part.config, UMT5Config):
        return TEXT_FILE, names_text.published(), dataclasses.asdict(part.config)
    raise ConfigError(
        f"source = {contents.path!r}: its codec is {part.config.kind!r}, and published folders know only the Wan VAE"
    )


def _place(name: str, world: WorldConfig) -> tuple[str, str]:
    """Folder and class of a transformer: those of the 2.0 world that is sampled as this one is, else the first's."""
    for folder, preset in SECOND.items():
        if world.causal is not None and world.causal == PRESETS[preset]["causal"]:
            return folder, SECOND_CLASSES[folder]
    return FOLDERS[name], "WanModel" if world.causal is None else "WanModelFast"


def wan_json(config: DiTConfig, kind: str) -> dict[str, Any]:
    """The published config.json of a transformer.

    Raises:
      ConfigError: a field that the published class fixes has another value.
    """
    theta = config.rope_theta
    require(theta == 10000, "networks.rope_theta", theta, "the published class has 10000")
    values = {
        "_class_name": kind,
        "model_type": "i2v" if config.image_condition else "t2v",
        "patch_size": list(config.patch),
        "dim": config.dim,
        "ffn_dim": config.ffn,
        "num_heads": config.heads,
        "num_layers": config.layers,
        "in_dim": config.in_channels,
        "out_dim": config.latent_channels,
        "freq_dim": config.freq_dim,
        "text_dim": config.text_dim,
        "text_len": config.text_len,
        "eps": config.eps,
    }
    return values if config.control == "none" else values | {"control_type": config.control}


def _shards(
    stem: pathlib.Path,
    table: list[Entry],
    part: Part,
    metadata: dict[str, str],
    tick: Callable[[int], None],
    shard_bytes: int | None,
) -> None:
    """Writes `stem.safetensors`, or numbered shards and their index (`shard_bytes` None: never)."""
    units = [(e, layer) for e in table for layer in layers_of(e, part.specs[e.ours].shape)]
    groups, room = [[]], shard_bytes
    for entry, layer in units:
        spec = part.specs[entry.ours]
        size = nbytes({entry.ours: spec}) // (spec.shape[0] if entry.stacked else 1)
        if room is not None and size > room and groups[-1]:
            groups.append([])
            room = shard_bytes
        groups[-1].append((entry, layer))
        room = None if room is None else room - size
    index: dict[str, Any] = {"metadata": {"total_size": 0}, "weight_map": {}}
    read = part.open()
    for number, group in enumerate(groups, 1):
        suffix = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        name = f"{stem.name}{suffix}.safetensors"
        tensors = {}
        for entry, layer in group:
            values = entry.to_published(read(entry.ours, layer))
            # safetensors writes the buffer as it lies, whatever the strides say.
            tensors |= dict(zip(part_names(entry, layer), map(np.ascontiguousarray, values), strict=True))
        save_file(tensors, stem.with_name(name), metadata={"format": "pt"} | metadata)
        written = sum(tensor.nbytes for tensor in tensors.values())
        index["metadata"]["total_size"] += written
        index["weight_map"] |= {key: name for key in tensors}
        tick(written)
    if len(groups) > 1:
        index_file = stem.with_name(f"{stem.name}.safetensors.index.json")
        index_file.write_text(json.dumps(index, indent=2) + "\n")
