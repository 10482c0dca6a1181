"""Conversion both ways: a checkpoint folder -> a bundle, and a bundle -> safetensors with published names.

Everything is checked before anything is written; one error lists all tensors that do not fit. What is
written goes to a temporary folder beside the target and is renamed when it is whole. At most one layer of
one parameter is in memory (published -> bundle), or one shard (bundle -> published).
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from lingbot_jax.config import ConfigError, require
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.convert import names_dit, names_text, names_vae
from lingbot_jax.convert.folders import (
    TEXT_FILE,
    TOKENIZER_FILES,
    VAE_FILE,
    Checkpoint,
    Network,
    parameter_shapes,
)
from lingbot_jax.convert.names import Entry, layers_of, part_names
from lingbot_jax.convert.read import differences, read_layer
from lingbot_jax.models.config import UMT5Config
from lingbot_jax.models.config import VAEConfig
from lingbot_jax.rollout.bidirectional import SampleConfig
from lingbot_jax.rollout.causal import CausalConfig
from lingbot_jax.serve import bundle

StoredDtype = Literal["keep", "bfloat16", "float32"]
Progress = Callable[[str, int], None]  # network, bytes written since the last call
SHARD_BYTES = 4 << 30
FOLDERS = {"high": "high_noise_model", "low": "low_noise_model", "world": "world_model"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be written for one network.

    Attributes:
      network: what is read. specs: shape and dtype of our parameters by dotted path.
      source_bytes: size of the published tensors.
    """

    network: Network
    specs: dict[str, jax.ShapeDtypeStruct]
    source_bytes: int

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(spec.shape)) for spec in self.specs.values())

    @property
    def nbytes(self) -> int:
        return sum(int(np.prod(spec.shape)) * spec.dtype.itemsize for spec in self.specs.values())

    def __str__(self) -> str:
        source = self.network.source
        dtypes = "+".join(sorted({str(t.dtype) for t in source.tensors.values()}))
        stored = "+".join(sorted({str(spec.dtype) for spec in self.specs.values()}))
        return (
            f"{self.network.name}: {len(source.tensors)} {self.network.layout} tensors, {self.parameters / 1e9:.2f}B "
            f"parameters, {dtypes} {self.source_bytes / 1e9:.2f} GB -> {len(self.specs)} parameters, "
            f"{stored} {self.nbytes / 1e9:.2f} GB"
        )


def plan(checkpoint: Checkpoint, dtype: StoredDtype = "bfloat16") -> list[Plan]:
    """Checks every tensor of a checkpoint against our models, and says what a conversion writes.

    Args:
      dtype: of the stored transformers and text encoder. The VAE keeps its own: it is small, and its
        rounding would show in the picture.

    Raises:
      ConfigError: tensors are missing, surplus, misshapen or of a dtype that we do not read; all of them.
    """
    plans, wrong = [], []
    for network in checkpoint.networks:
        slots = network.slots()
        found = differences(slots, network.source)
        wrong += [f"{network.name}: {difference}" for difference in found]
        if found:
            continue
        keep = dtype == "keep" or isinstance(network.config, VAEConfig)
        specs = {}
        for path, shape in network.shapes().items():
            entry = next(e for e in network.table if e.ours == path)
            first = part_names(entry, next(layers_of(entry, shape)))[0]
            stored = network.source.tensors[first].dtype if keep else np.dtype(_DTYPES[dtype])
            specs[path] = jax.ShapeDtypeStruct(shape, stored)
        size = sum(tensor.nbytes for tensor in network.source.tensors.values())
        plans.append(Plan(network, specs, size))
    if any(network.name == "text" for network in checkpoint.networks) and checkpoint.tokenizer is None:
        wrong.append(f"text: missing its tokenizer, {TOKENIZER_FILES[0]}")
    if wrong:
        raise ConfigError("\n  ".join([f"{len(wrong)} tensors or files do not fit:", *wrong]))
    return plans


_DTYPES: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def to_bundle(
    checkpoint: Checkpoint,
    out: str | pathlib.Path,
    dtype: StoredDtype = "bfloat16",
    progress: Progress | None = None,
) -> None:
    """Writes a checkpoint as a bundle (`serve.bundle`).

    Raises:
      ConfigError: see `plan`; or `out` exists, or the disk is too small. Nothing is written then.
    """
    plans = plan(checkpoint, dtype)
    configs = {p.network.name: p.network.config for p in plans}
    world = {name: config for name, config in configs.items() if isinstance(config, DiTConfig)}
    manifest = bundle.Manifest(
        world=world,
        vae=configs.get("vae"),
        text=configs.get("text"),
        sample=SampleConfig() if world and not checkpoint.fast else None,
        causal=CausalConfig() if world and checkpoint.fast else None,
    )
    with _whole(out, sum(p.nbytes for p in plans)) as folder:
        for p in plans:
            target = bundle.params_folder(folder, p.network.name)
            target.parent.mkdir(exist_ok=True)
            writer = bundle.ParamsWriter(target, p.specs)
            for entry in p.network.table:
                spec = p.specs[entry.ours]
                for layer in layers_of(entry, spec.shape):
                    value = read_layer(entry, layer, p.network.source).astype(spec.dtype, copy=False)
                    writer.write(entry.ours, layer, value)
                    if progress:
                        progress(p.network.name, value.nbytes)
        if checkpoint.tokenizer and "text" in configs:
            shutil.copyfile(checkpoint.tokenizer, folder / bundle.TOKENIZER)
        bundle.write_manifest(folder, manifest)


def to_published(
    source: str | pathlib.Path, out: str | pathlib.Path, progress: Progress | None = None
) -> None:
    """Writes a bundle as a folder with the published names; safetensors in place of `.pth`.

    Raises:
      ConfigError: `source` is not a bundle, or cannot be said in published terms; `out` exists.
    """
    manifest = bundle.read_manifest(source)
    networks = [(name, config) for name, config in manifest.world.items()]
    networks += [(name, c) for name, c in (("vae", manifest.vae), ("text", manifest.text)) if c]
    readers = {name: bundle.ParamsReader(bundle.params_folder(source, name)) for name, _ in networks}
    for name, config in networks:
        stored = {path: spec.shape for path, spec in readers[name].specs.items()}
        require(
            stored == parameter_shapes(config), f"bundle params/{name}", source, "does not fit bundle.json"
        )
    size = sum(_nbytes(spec) for reader in readers.values() for spec in reader.specs.values())
    with _whole(out, size) as folder:
        for name, config in networks:
            tick = (lambda done, name=name: progress(name, done)) if progress else (lambda done: None)
            if isinstance(config, DiTConfig):
                target = folder / FOLDERS[name]
                target.mkdir()
                fast = manifest.causal is not None
                (target / "config.json").write_text(json.dumps(wan_json(config, fast), indent=2) + "\n")
                _shards(
                    target,
                    "diffusion_pytorch_model",
                    names_dit.dit_table(config),
                    readers[name],
                    tick,
                    SHARD_BYTES,
                )
            else:
                stem, table = _file_of(config)
                _shards(folder, stem, table, readers[name], tick, None)
        if manifest.text:
            (folder / TOKENIZER_FILES[0]).parent.mkdir(parents=True)
            shutil.copyfile(pathlib.Path(source) / bundle.TOKENIZER, folder / TOKENIZER_FILES[0])


def _file_of(config: VAEConfig | UMT5Config) -> tuple[str, list[Entry]]:
    if isinstance(config, VAEConfig):
        return VAE_FILE, names_vae.published(config)
    return TEXT_FILE, names_text.published()


def wan_json(config: DiTConfig, fast: bool) -> dict[str, Any]:
    """The published config.json of a transformer.

    Raises:
      ConfigError: a field that the published class fixes has another value.
    """
    require(
        config.spatial_stride == 8, "model.spatial_stride", config.spatial_stride, "the published class has 8"
    )
    values = {
        "_class_name": "WanModelFast" if fast else "WanModel",
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


def _nbytes(spec: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(spec.shape)) * spec.dtype.itemsize


def _shards(
    folder: pathlib.Path,
    stem: str,
    table: list[Entry],
    reader: bundle.ParamsReader,
    tick: Callable[[int], None],
    shard_bytes: int | None,
) -> None:
    """Writes `stem.safetensors`, or numbered shards and their index (`shard_bytes` None: never)."""
    units = [(e, layer) for e in table for layer in layers_of(e, reader.specs[e.ours].shape)]
    groups, room = [[]], shard_bytes
    for entry, layer in units:
        spec = reader.specs[entry.ours]
        size = _nbytes(spec) // (spec.shape[0] if entry.stacked else 1)
        if room is not None and size > room and groups[-1]:
            groups.append([])
            room = shard_bytes
        groups[-1].append((entry, layer))
        room = None if room is None else room - size
    index: dict[str, Any] = {"metadata": {"total_size": 0}, "weight_map": {}}
    for number, group in enumerate(groups, 1):
        suffix = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        name = f"{stem}{suffix}.safetensors"
        tensors = {}
        for entry, layer in group:
            values = entry.to_published(reader.read(entry.ours, layer))
            # safetensors writes the buffer as it lies, whatever the strides say.
            tensors |= dict(zip(part_names(entry, layer), map(np.ascontiguousarray, values), strict=True))
        save_file(tensors, folder / name, metadata={"format": "pt"})
        written = sum(tensor.nbytes for tensor in tensors.values())
        index["metadata"]["total_size"] += written
        index["weight_map"] |= {key: name for key in tensors}
        tick(written)
    if len(groups) > 1:
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@contextlib.contextmanager
def _whole(out: str | pathlib.Path, nbytes: int) -> Iterator[pathlib.Path]:
    """A temporary folder that becomes `out` when the block ends well, and disappears when it does not."""
    out = pathlib.Path(out).absolute()
    require(not out.exists(), "out", str(out), "exists; choose another folder or remove it")
    require(out.parent.is_dir(), "out", str(out), "its parent folder does not exist")
    free = shutil.disk_usage(out.parent).free
    room = f"needs {nbytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there"
    require(nbytes < free, "out", str(out), room)
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
