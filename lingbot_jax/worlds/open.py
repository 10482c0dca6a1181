"""Opens a run or a bundle. They differ only in where their arrays lie:

a bundle    bundle.json (the WorldConfig), params/NAME/ of every network, of `codec` and of `text`, tokenizer.json,
            manifest.json (hashes) and pictures/ to start from
a run       config.json (a TrainConfig, which contains the WorldConfig), checkpoints/; codec and text encoder where
            its `codec` says, a path relative to the run where they are its own copy
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any, Literal

import jax
from etils import epath
from jax.sharding import Mesh

from lingbot_jax import files
from lingbot_jax.config import ConfigError, build
from lingbot_jax.models import params
from lingbot_jax.models.config import NgramConfig
from lingbot_jax.models.lora import LoraConfig
from lingbot_jax.models.text import HashedNgramEncoder, TextEncoder, UMT5Encoder, load_tokenizer
from lingbot_jax.parallel.mesh import MeshConfig, make_mesh
from lingbot_jax.worlds import manifest, quantization, storage
from lingbot_jax.worlds.checkpoints import Checkpoints
from lingbot_jax.worlds.config import WorldConfig
from lingbot_jax.worlds.merging import read_merged
from lingbot_jax.worlds.world import CODEC, TEXT, Arrays, World, assemble, modules, specs, template

FORMAT = 2
BUNDLE = "bundle.json"
RUN = "config.json"
TOKENIZER = "tokenizer.json"
SERVING = MeshConfig(fsdp=1, seq=-1)  # how devices share a sample unless told otherwise


@dataclasses.dataclass(frozen=True)
class Source:
    """A run or a bundle that has been found and described, and of which nothing has been read.

    Attributes:
      path: the folder. config: what it says of itself. codec: where codec and text encoder lie, if elsewhere.
      lora: low-rank adapters of a run's networks, of which `config` says nothing: what is read has them merged.
    """

    path: epath.Path
    config: WorldConfig
    run: bool
    codec: epath.Path | None = None
    lora: LoraConfig = LoraConfig()

    def read(self, name: str, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Arrays:
        """The arrays of a network, of `codec` or of `text`, each straight into its place; of a run the averaged
        parameters. Raises ConfigError."""
        if name in (CODEC, TEXT) and self.codec is not None:
            return find(self.codec).read(name, wanted)
        if self.run:
            read = functools.partial(Checkpoints(self.path, read_only=True).averaged, name)
            merges = self.lora.rank and name in self.config.networks
            return (
                read_merged(read, self.config.networks[name], self.lora, wanted) if merges else read(wanted)
            )
        return quantization.read(params_folder(self.path, name), wanted)

    def tokenizer(self) -> epath.Path:
        return find(self.codec).tokenizer() if self.codec is not None else self.path / TOKENIZER


def params_folder(bundle: epath.PathLike, name: str) -> epath.Path:
    """Where a bundle has the arrays of a network, of `codec` or of `text`."""
    return epath.Path(bundle) / "params" / name


def find(path: epath.PathLike, field: str = "run") -> Source:
    """Looks at a folder. Raises ConfigError: neither a run nor a bundle, or damaged, or of another version."""
    folder = epath.Path(path)
    if (folder / BUNDLE).exists():
        return Source(folder, _bundle_config(folder, field), run=False)
    if (folder / RUN).exists():
        values = files.read_json(folder / RUN, field)
        config = build(WorldConfig, values.get("world", {}), f"{folder / RUN}: world")
        lora = build(LoraConfig, values.get("lora", {}), f"{folder / RUN}: lora")
        codec = values.get("codec")
        if not isinstance(codec, str):
            raise ConfigError(f"{folder / RUN}: codec = {codec!r}: must be a path; the file is damaged")
        return Source(folder, config, run=True, codec=folder / codec, lora=lora)
    raise ConfigError(
        f"{field} = {str(path)!r}: neither a run ({RUN} of experiments.train) nor a bundle ({BUNDLE} of "
        "experiments.convert) is there"
    )


def _bundle_config(folder: epath.Path, field: str) -> WorldConfig:
    values = files.read_json(folder / BUNDLE, field)
    version = values.pop("format", None)  # first: other fields of another version would only confuse
    if version != FORMAT:
        raise ConfigError(
            f"{field} = {str(folder)!r}: bundle format {version!r}, this version reads {FORMAT}; convert the "
            "checkpoint again: python -m experiments.convert --source=CHECKPOINT --out=BUNDLE"
        )
    manifest.read(folder, field)
    return build(WorldConfig, values, f"{folder / BUNDLE}")


def bundle_text(config: WorldConfig) -> str:
    """What bundle.json holds: the format version and the WorldConfig."""
    return json.dumps({"format": FORMAT, **dataclasses.asdict(config)}, indent=1) + "\n"


def write_bundle_config(folder: epath.PathLike, config: WorldConfig) -> None:
    """Writes bundle.json."""
    (epath.Path(folder) / BUNDLE).write_text(bundle_text(config))


def write_codec(folder: epath.PathLike, codec: Any) -> None:
    """Writes a bundle that holds a codec and nothing else: what `experiments.fit_codec` makes and a run copies."""
    storage.write(params_folder(folder, CODEC), params.arrays_of(codec))
    write_bundle_config(folder, WorldConfig(codec=codec.config))


def default_mesh(weights: Literal["split", "whole"] = "split") -> Mesh:
    """All devices of the job share every sample: what sampling and play want.

    Args:
      weights: parameters split over the devices, or whole on each (`MeshConfig.weights`).
    """
    return make_mesh(dataclasses.replace(SERVING, weights=weights))


def open_world(
    path: epath.PathLike,
    mesh: Mesh | None = None,
    dtype: Any = None,
    abstract: bool = False,
    field: str = "run",
) -> World:
    """Opens a run or a bundle onto a mesh; each array is read where it belongs and nowhere else.

    Args:
      path: a folder, local or gs://. mesh: None: all devices, along `seq`.
      dtype: of the parameters of networks and text encoder; None: as stored.
      abstract: shapes with shardings in place of arrays; nothing is read but the description.
      field: the name of the flag that `path` is from, for errors.

    Raises:
      ConfigError: nothing there, damaged, incomplete, or sizes that the mesh does not divide.
    """
    source = find(path, field)
    source.config.check_complete(f"{field} = {str(path)!r}")
    mesh = default_mesh() if mesh is None else mesh
    if abstract:
        return abstract_world(source.config, mesh, dtype)
    networks = {name: read_module(source, name, mesh, dtype) for name in source.config.networks}
    codec, text = open_encoders(source, mesh, dtype)
    return World(networks, codec, text, source.config, mesh)


def open_encoders(source: Source, mesh: Mesh, dtype: Any = None) -> tuple[Any, TextEncoder]:
    """The codec and the text encoder of a source. Raises ConfigError."""
    config = source.config
    codec = read_module(source, CODEC, mesh)
    if isinstance(config.text, NgramConfig):
        return codec, HashedNgramEncoder(config.text)
    tokenizer = load_tokenizer(source.tokenizer(), config.text.length)
    return codec, UMT5Encoder(read_module(source, TEXT, mesh, dtype), tokenizer)


def read_module(source: Source, name: str, mesh: Mesh, dtype: Any = None) -> Any:
    """A network, `codec` or `text` of a source, in its place on the mesh. Raises ConfigError."""
    described = {CODEC: source.config.codec, TEXT: source.config.text, **source.config.networks}
    module = template(described[name])
    wanted = specs(module, mesh, dtype)
    arrays = source.read(name, wanted)
    for path, spec in wanted.items():
        if spec.format.layout is not None:  # read as JAX lays out arrays, kept as its programs want it
            arrays[path] = jax.device_put(arrays[path], spec.format, donate=True)
    return assemble(module, arrays)


def abstract_world(config: WorldConfig, mesh: Mesh, dtype: Any = None) -> World:
    """The world of a description as shapes with shardings: for plans, and for checkpoints to be read onto."""
    made = {
        name: params.with_arrays(module, specs(module, mesh, None if name == CODEC else dtype))
        for name, module in modules(config).items()
    }
    codec = made.pop(CODEC)
    ngram = isinstance(config.text, NgramConfig)
    text = HashedNgramEncoder(config.text) if ngram else UMT5Encoder(made.pop(TEXT), None)
    return World(made, codec, text, config, mesh)
