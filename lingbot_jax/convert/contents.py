"""What a source holds: a checkpoint folder, a run, a bundle, or two of these with an expert each. Nothing is read yet.

All of them come to the same `Contents`, from which `write` makes a bundle or a published folder and `report` a text.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from lingbot_jax import axes as ax
from lingbot_jax import files
from lingbot_jax.config import ConfigError
from lingbot_jax.convert import folders
from lingbot_jax.convert.names import expand, layers_of, part_names
from lingbot_jax.convert.read import differences, first_few, read_layer
from lingbot_jax.files import is_remote
from lingbot_jax.models import params
from lingbot_jax.models.config import UMT5Config, VAEConfig
from lingbot_jax.worlds import quantization, storage
from lingbot_jax.worlds.config import EXPERTS, WorldConfig
from lingbot_jax.worlds.open import BUNDLE, RUN, Source, find, params_folder
from lingbot_jax.worlds.quantization import SCALE
from lingbot_jax.worlds.world import CODEC, TEXT, modules, template

Read = Callable[[str, int | None], np.ndarray]  # path, layer (None: of an array that is not stacked)


@dataclasses.dataclass(frozen=True)
class Part:
    """The arrays of a network, of the codec or of the text encoder.

    Attributes:
      name: `high`, `low`, `world`, `codec` or `text`. config: its sizes.
      specs: shape and stored dtype of each of our parameters by dotted path. tensors: how many the source has.
      open: starts to read; what it holds in memory goes with the function that it returns.
      wrong: what does not fit its config; it cannot be read then.
    """

    name: str
    config: Any
    specs: Mapping[str, jax.ShapeDtypeStruct]
    tensors: int
    open: Callable[[], Read]
    wrong: tuple[str, ...] = ()

    def units(self) -> list[tuple[str, int | None]]:
        """Everything to read, layer by layer."""
        layers = stacked(self.config)
        return [
            (path, layer)
            for path, spec in self.specs.items()
            for layer in (range(spec.shape[0]) if path.removesuffix(SCALE) in layers else (None,))
        ]


@dataclasses.dataclass(frozen=True)
class Contents:
    """Attributes:
    kind: in words. path: as given. config: the world. parts: its arrays. tokenizer: its file, if there is one.
    notes: what is missing or left out, a line each.
    """

    kind: str
    path: str
    config: WorldConfig
    parts: tuple[Part, ...]
    tokenizer: epath.Path | None
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises ConfigError unless all of it can be read: the first that does not fit, by network, in one line."""
        wrong = [
            f"{part.name}: {len(part.wrong)} tensors do not fit: {first_few(list(part.wrong))}"
            for part in self.parts
            if part.wrong
        ]
        if isinstance(self.config.text, UMT5Config) and self.tokenizer is None:
            wrong.append(f"text: missing its tokenizer, {' or '.join(folders.TOKENIZER_FILES)}")
        if wrong:
            raise ConfigError(f"source = {self.path!r}: {'; '.join(wrong)}")


@functools.lru_cache(maxsize=64)
def stacked(config: Any) -> frozenset[str]:
    """Paths of the parameters whose leading axis is one of layers."""
    axes = params.logical_axes(template(config))
    return frozenset(path for path, names in axes.items() if names and names[0] == ax.LAYERS)


def look(source: str, **hints: Any) -> Contents:
    """What `source` holds: a folder, or `high=FOLDER,low=FOLDER` (or two folders of one expert each).

    Args:
      hints: what a checkpoint folder does not say: `control`, `assets`, `heads`, `preset` of `folders.find`.

    Raises:
      ConfigError: nothing known there, or damaged, or two that do not belong together.
    """
    entries = [re.fullmatch(r"(?:(high|low)=)?(.+)", entry.strip()) for entry in source.split(",")]
    if len(entries) == 1 and not (entries[0] and entries[0][1]) or _exists(source):
        return _with_notes(_look(source, hints))
    if not all(entries) or len(entries) > 2:
        raise ConfigError(f"source = {source!r}: must be a folder, or high=FOLDER,low=FOLDER")
    found = [(entry[1], _look(entry[2], hints)) for entry in entries]
    return _with_notes(_merged(source, [_expert(name, contents) for name, contents in found]))


def _exists(source: str) -> bool:
    return not is_remote(source) and os.path.isdir(source)


def _look(path: str, hints: Mapping[str, Any]) -> Contents:
    folder = epath.Path(path)
    with storage.errors_as(lambda why: ConfigError(f"source = {path!r}: cannot be read ({why})")):
        bundle = (folder / BUNDLE).exists()
        described = not bundle and (folder / RUN).is_file()
        run = described and "world" in files.read_json(folder / RUN, "source")
    if bundle or run:
        for name, value in hints.items():
            if value is not None:
                raise ConfigError(f"{name} = {value!r}: only of a checkpoint folder; {path} says its own")
        return _of_world(path, find(path, "source"))
    if is_remote(path):
        raise ConfigError(
            f"source = {path!r}: neither a run nor a bundle; checkpoint folders are read from a disk"
        )
    return _of_checkpoint(path, folders.find(path, **hints))


def _of_checkpoint(path: str, checkpoint: folders.Checkpoint) -> Contents:
    kind = {"published": "published checkpoint", "diffusers": "diffusers checkpoint"}[checkpoint.layout]
    left_out = (f"left out: {', '.join(checkpoint.others[:10])}",) if checkpoint.others else ()
    parts = tuple(_part_of(network) for network in checkpoint.networks)
    tokenizer = checkpoint.tokenizer and epath.Path(checkpoint.tokenizer)
    return Contents(kind, path, checkpoint.config, parts, tokenizer, left_out)


def _part_of(network: folders.Network) -> Part:
    """The part that a network of a checkpoint folder makes."""
    tensors, config = network.source.tensors, network.config
    blocks = len(config.mults) * config.blocks if isinstance(config, VAEConfig) else config.layers
    if blocks > len(tensors):  # before a model of that depth is made
        return Part(
            network.name,
            config,
            {},
            len(tensors),
            _unreadable,
            (f"{blocks} blocks in {len(tensors)} tensors",),
        )
    shapes = {path: tuple(leaf.shape) for path, leaf in params.arrays_of(template(config)).items()}
    entries = {entry.ours: entry for entry in network.table}
    wrong = differences(expand(network.table, shapes), network.source)
    first = {path: part_names(e, next(layers_of(e, shapes[path])))[0] for path, e in entries.items()}
    specs = {}
    if not wrong:
        specs = {p: jax.ShapeDtypeStruct(shapes[p], tensors[name].dtype) for p, name in first.items()}
    read = lambda path, layer: read_layer(entries[path], layer, network.source)
    return Part(network.name, config, specs, len(tensors), lambda: read, tuple(wrong))


def _unreadable() -> Read:
    raise AssertionError("Contents.check comes first")


def _of_world(path: str, source: Source) -> Contents:
    parts = []
    for name, module in modules(source.config).items():
        owner = source
        while name in (CODEC, TEXT) and owner.codec is not None:
            owner = find(owner.codec, "source")
        described = getattr(owner.config, name) if name in (CODEC, TEXT) else owner.config.networks[name]
        wanted = {
            p: jax.ShapeDtypeStruct(tuple(a.shape), a.dtype) for p, a in params.arrays_of(module).items()
        }
        if owner.run:
            open_part = functools.partial(_open_run, owner, name, wanted)
            parts.append(Part(name, described, wanted, len(wanted), open_part))
            continue
        stored = quantization.Reader(params_folder(owner.path, name)).specs
        storage.check_fit(f"{owner.path}: {name}", stored, wanted)
        open_part = functools.partial(_open_bundle, params_folder(owner.path, name))
        parts.append(Part(name, described, {p: stored[p] for p in wanted}, len(wanted), open_part))
    text = isinstance(source.config.text, UMT5Config)
    tokenizer = source.tokenizer() if text and source.tokenizer().exists() else None
    notes = (f"merged: low-rank adapters of rank {source.lora.rank}",) if source.lora.rank else ()
    return Contents("run" if source.run else "bundle", path, source.config, tuple(parts), tokenizer, notes)


def _open_bundle(folder: epath.Path) -> Read:
    return quantization.Reader(folder).read


def _open_run(source: Source, name: str, wanted: storage.Specs) -> Read:
    """All of a network at once: only so does a damaged checkpoint give way to the one before it."""
    arrays = source.read(name, wanted)
    return lambda path, layer: np.asarray(arrays[path] if layer is None else arrays[path][layer])


def _expert(name: str | None, contents: Contents) -> Contents:
    """Only the expert `name` of a source (None: the one that it has)."""
    have = tuple(contents.config.networks)
    taken = name if name in have or have != ("world",) else "world"
    if taken is None and len(have) == 1 and have[0] in EXPERTS:
        taken = name = have[0]
    if taken not in have:
        raise ConfigError(
            f"source = {contents.path!r}: has {' and '.join(have) or 'no transformer'}, not {name or 'one expert'}; "
            "give two as high=FOLDER,low=FOLDER"
        )
    config = dataclasses.replace(contents.config, networks={name: contents.config.networks[taken]})
    parts = [p for p in contents.parts if p.name not in have or p.name == taken]
    parts = tuple(dataclasses.replace(p, name=name) if p.name == taken else p for p in parts)
    return dataclasses.replace(contents, config=config, parts=parts)


def _merged(source: str, found: list[Contents]) -> Contents:
    """One world of the experts of several; everything else is as of the first, and must be so in both."""
    if len(found) == 1:
        return found[0]
    first, second = found
    names = sorted(name for contents in found for name in contents.config.networks)
    if names != sorted(EXPERTS):
        raise ConfigError(f"source = {source!r}: has {' and '.join(names)}: must be one high and one low")
    for field in ("codec", "text", "boundary", "pose", "keyboard", "null_text", "caption"):
        one, other = getattr(first.config, field), getattr(second.config, field)
        if one != other:
            raise ConfigError(
                f"source = {source!r}: world.{field} differs: {one} in {first.path}, {other} in {second.path}"
            )
    if not _same_codec(first, second):
        raise ConfigError(
            f"source = {source!r}: the two codecs differ: experts of one world see the same latents"
        )
    networks = first.config.networks | second.config.networks
    try:
        config = dataclasses.replace(first.config, networks={name: networks[name] for name in EXPERTS})
    except ConfigError as error:
        raise ConfigError(f"source = {source!r}: {error}") from None
    experts = {p.name: p for p in (*first.parts, *second.parts) if p.name in networks}
    shared = [p for p in first.parts if p.name not in networks]
    parts = (*(experts[name] for name in EXPERTS), *shared)
    kind = f"{first.kind} and {second.kind}"
    return Contents(kind, source, config, parts, first.tokenizer, first.notes + second.notes)


def _same_codec(first: Contents, second: Contents) -> bool:
    """Whether two sources have the same codec, to the bit."""
    one, other = ({p.name: p for p in contents.parts}.get(CODEC) for contents in (first, second))
    if one is None or other is None or one.wrong or other.wrong:
        return (one is None) == (other is None)  # `check` says what is wrong
    if one.specs != other.specs:
        return False
    left, right = one.open(), other.open()
    return all(left(*unit).tobytes() == right(*unit).tobytes() for unit in one.units())


def _with_notes(contents: Contents) -> Contents:
    """Adds what the world lacks."""
    config, notes = contents.config, []
    alone = [name for name in config.networks if name in EXPERTS and len(config.networks) == 1]
    if alone:
        other = EXPERTS[1 - EXPERTS.index(alone[0])]
        notes.append(
            f"missing the other expert: {alone[0]} alone would be used at every noise level; give both as "
            f"--source={alone[0]}={contents.path},{other}=FOLDER"
        )
    notes += [f"missing: {what}" for what in ("networks", "codec", "text") if not getattr(config, what)]
    return dataclasses.replace(contents, notes=(*contents.notes, *notes))
