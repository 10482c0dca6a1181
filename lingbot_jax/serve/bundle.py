"""The serving bundle: a directory with everything that is needed to play.

    bundle.json           `Manifest`: format version, sizes of all networks, how to sample
    params/NAME/          Orbax checkpoint of a network: a flat dict from dotted path to array
    tokenizer.json        only with a umT5 text encoder

NAME is `high` and `low`, or `world` for a model of one expert; `vae`; `text`. The parameters are those of
`params.flat_params`, stacked blocks with their leading axis. The Orbax checkpoints are of the plain (not
OCDBT) form, one Zarr array a parameter and one chunk or more a layer, so that single layers can be written
and read without holding a whole parameter.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import nnx

from lingbot_jax.config import ConfigError, build, require
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models import params
from lingbot_jax.models.config import UMT5Config
from lingbot_jax.models.config import VAEConfig
from lingbot_jax.rollout.bidirectional import SampleConfig
from lingbot_jax.rollout.causal import CausalConfig

FORMAT = 1
MANIFEST = "bundle.json"
TOKENIZER = "tokenizer.json"
CHUNK_BYTES = 64 << 20  # of a stored array: large enough to stream, small enough to restore in parallel

Specs = Mapping[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Attributes:
    format: version of this format.
    world: the transformers by name: `high` and `low`, or `world`.
    vae, text: the codec and the text encoder, where the bundle has them.
    sample: how the base model is sampled. causal: how the fast model generates. One of them for a world.
    """

    format: int = FORMAT
    world: dict[str, DiTConfig] = dataclasses.field(default_factory=dict)
    vae: VAEConfig | None = None
    text: UMT5Config | None = None
    sample: SampleConfig | None = None
    causal: CausalConfig | None = None

    def __post_init__(self):
        require(self.format == FORMAT, "bundle.format", self.format, f"this version reads {FORMAT}")
        names = set(self.world)
        require(
            names in (set(), {"world"}, {"high", "low"}, {"high"}, {"low"}),
            "bundle.world",
            sorted(names),
            "must be 'high' and 'low', or 'world'",
        )


def write_manifest(folder: pathlib.Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")


def read_manifest(folder: str | pathlib.Path) -> Manifest:
    """Raises ConfigError: no bundle there, or one that this version cannot read."""
    path = pathlib.Path(folder) / MANIFEST
    if not path.is_file():
        raise ConfigError(f"bundle = {str(folder)!r}: no {MANIFEST} there; experiments.convert makes bundles")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"bundle = {str(path)!r}: not JSON ({error})") from None
    # The version first: other fields of another version would only confuse.
    version = values.get("format")
    require(version == FORMAT, "bundle.format", version, f"this version reads {FORMAT}")
    return build(Manifest, values, "bundle")


def params_folder(bundle: str | pathlib.Path, name: str) -> pathlib.Path:
    """Where the parameters of a network are."""
    return pathlib.Path(bundle).absolute() / "params" / name


class ParamsWriter:
    """Writes a network's parameters layer by layer.

    Orbax makes the checkpoint around arrays of zeros that take no memory and next to no disk, and the values
    are then written into its arrays.
    """

    def __init__(self, folder: pathlib.Path, specs: Specs):
        """`specs` are shape and dtype by dotted path; `folder` must not exist."""
        zeros = {path: np.broadcast_to(np.zeros((), s.dtype), s.shape) for path, s in specs.items()}
        handlers = ocp.type_handlers.create_type_handler_registry(
            (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
            (jax.Array, ocp.type_handlers.ArrayHandler()),
        )
        # Chunks are split over the leading axis first: no chunk holds two layers of a large parameter.
        chunked = {
            path: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if s.ndim > 1 else ())
            for path, s in specs.items()
        }
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=handlers)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(zeros, save_args=chunked))
        self._stores = {path: _store(folder, path) for path in specs}

    def write(self, path: str, layer: int | None, value: np.ndarray) -> None:
        """Writes one layer (None: the whole of a parameter that is not stacked)."""
        store = self._stores[path]
        (store if layer is None else store[layer]).write(value).result()


class ParamsReader:
    """Reads a network's parameters layer by layer."""

    def __init__(self, folder: pathlib.Path):
        """Raises ConfigError: no checkpoint there."""
        if not (folder / "_METADATA").is_file():
            raise ConfigError(f"bundle: {folder} is missing or is not a checkpoint")
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(folder.absolute()).item_metadata.tree
        self.specs = {path: jax.ShapeDtypeStruct(m.shape, m.dtype) for path, m in tree.items()}
        self._stores = {path: _store(folder, path) for path in self.specs}

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """One layer (None: the whole of a parameter that is not stacked)."""
        store = self._stores[path]
        return np.asarray((store if layer is None else store[layer]).read().result())


def _store(folder: pathlib.Path, path: str) -> tensorstore.TensorStore:
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder.absolute() / path)}}
    return tensorstore.open(spec, open=True).result()


def restore(
    folder: pathlib.Path,
    template: nnx.Module,
    dtype: Any = None,
    sharding: Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding] | None = None,
) -> nnx.Module:
    """The network in `folder` with the structure of `template`.

    Args:
      folder: `params_folder` of a bundle.
      template: the module, or its abstract form.
      dtype: of all parameters; None: as stored.
      sharding: for each dotted path and shape; None: on one device. Each process reads its own part only.

    Raises:
      ConfigError: the checkpoint does not fit the template; all differences, by name.
    """
    stored = ParamsReader(folder).specs
    shapes = {path: tuple(leaf.shape) for path, leaf in params.flat_params(template).items()}
    wrong = [f"missing {path}" for path in shapes if path not in stored]
    wrong += [f"surplus {path}" for path in stored if path not in shapes]
    wrong += [
        f"misshapen {path} {list(stored[path].shape)}, needs {list(shape)}"
        for path, shape in shapes.items()
        if path in stored and stored[path].shape != shape
    ]
    if wrong:
        raise ConfigError("\n  ".join([f"{folder}: {len(wrong)} parameters do not fit:", *wrong]))
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {}
    for path, spec in stored.items():
        spec = jax.ShapeDtypeStruct(spec.shape, spec.dtype if dtype is None else jnp.dtype(dtype))
        place = single if sharding is None else sharding(path, spec)
        wanted[path] = jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=place)
    with ocp.StandardCheckpointer() as checkpointer:
        values = checkpointer.restore(folder.absolute(), wanted)
    graph, state = nnx.split(template)
    filled = [(p, leaf.replace(values[".".join(map(str, p))])) for p, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(filled))
