"""A world in memory: its networks by name, codec and text encoder, placed on a mesh."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lingbot_jax.axes import LAYERS
from lingbot_jax.config import ConfigError
from lingbot_jax.models import params
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.codec import Codec, LinearCodec
from lingbot_jax.models.config import (
    CodecConfig,
    ConvCodecConfig,
    DiTConfig,
    LinearCodecConfig,
    NgramConfig,
    UMT5Config,
    VAEConfig,
)
from lingbot_jax.models.conv_codec import ConvCodec
from lingbot_jax.models.dit import WorldDiT
from lingbot_jax.models.lora import LoraConfig, adapted
from lingbot_jax.models.text import UMT5, TextEncoder
from lingbot_jax.models.vae import WanVAE
from lingbot_jax.parallel import sharding
from lingbot_jax.parallel.sequence import attention_kernel
from lingbot_jax.worlds.config import SampleConfig, WorldConfig

if TYPE_CHECKING:
    from lingbot_jax.rollout.session import Session

Arrays = dict[str, jax.Array]
MODULES = {
    DiTConfig: WorldDiT,
    LinearCodecConfig: LinearCodec,
    ConvCodecConfig: ConvCodec,
    VAEConfig: WanVAE,
    UMT5Config: UMT5,
}
CODEC, TEXT = "codec", "text"  # names of the other two modules beside those of the networks


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("networks", "codec", "text"),
    meta_fields=("config", "mesh"),
)
@dataclasses.dataclass(frozen=True)
class World:
    """A pytree. Of an abstract world (`open_world(abstract=True)`) the arrays are shapes with shardings.

    Attributes:
      networks: `world`, or `high` and `low`. codec, text: what turns video and prompts into what they see.
      config: the description. mesh: where everything lies; a laptop has a mesh of one device.
    """

    networks: dict[str, WorldDiT]
    codec: Codec
    text: TextEncoder
    config: WorldConfig
    mesh: Mesh

    @property
    def attend(self) -> Attend:
        """Attention by the kernels of this mesh."""
        return Attend(kernel=attention_kernel(self.mesh, self.config.network.heads))

    def encode_text(self, texts: Sequence[str]) -> Float[Array, "b l d"]:
        """Tokens of prompts, on the mesh."""
        tokens = self.text.tokenize(list(texts))
        with jax.set_mesh(self.mesh):
            return encode_tokens(self.text, tokens)

    def encode_negative(self, sample: SampleConfig) -> Float[Array, "1 l d"]:
        """Tokens of the unconditional branch: of the negative prompt, else of the text that stands for none."""
        return self.encode_text([sample.negative_prompt or self.config.null_text])

    def session(self, **settings: Any) -> "Session":
        """A running world to be walked with keys, with the world's own settings unless some are given
        (`rollout.session.SessionConfig`). Raises ConfigError: the world does not generate chunks."""
        from lingbot_jax.rollout.session import Session  # the one arrow upwards: what a user types

        return Session(self, **settings)


encode_tokens = jax.jit(lambda encoder, tokens: encoder(tokens))


def template(config: DiTConfig | CodecConfig | UMT5Config, lora: LoraConfig = LoraConfig()) -> Any:  # noqa: B008 - frozen
    """The abstract module of a config, a transformer with low-rank adapters where asked; nothing is allocated."""
    return _template(config, lora)


@functools.lru_cache(maxsize=64)
def _template(config: Any, lora: LoraConfig) -> Any:
    if lora.rank:
        return params.abstract(lambda key: adapted(config, lora, key))
    return params.abstract(lambda key: MODULES[type(config)](config, key))


def modules(config: WorldConfig) -> dict[str, Any]:
    """Abstract modules of everything in a world that has arrays, by name."""
    described = dict(config.networks)
    described |= {CODEC: config.codec} if config.codec is not None else {}
    described |= {TEXT: config.text} if not isinstance(config.text, NgramConfig | None) else {}
    return {name: template(part) for name, part in described.items()}


def specs(module: Any, mesh: Mesh, dtype: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Where each parameter of an abstract module belongs on a mesh, by path.

    Transformers and text encoder are sharded by the one table; a codec, small beside them, is replicated.

    Args:
      dtype: of floating-point parameters; None: as the module has them.

    Raises:
      ConfigError: sizes that the mesh does not divide.
    """
    arrays, axes = params.arrays_of(module), params.logical_axes(module)
    if isinstance(module, LinearCodec | ConvCodec | WanVAE):
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        places = dict.fromkeys(arrays, whole)
    else:
        places = sharding.shardings_by_path(arrays, axes, mesh)

    def placed(path: str, leaf: jax.Array) -> jax.ShapeDtypeStruct:
        made = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if dtype is None else jnp.dtype(dtype))
        stacked = axes[path][:1] == (LAYERS,)
        place = sharding.stacked_format(made, places[path]) if stacked else places[path]
        return jax.ShapeDtypeStruct(made.shape, made.dtype, sharding=place)

    return {path: placed(path, leaf) for path, leaf in arrays.items()}


def assemble(template: Any, arrays: Mapping[str, jax.Array]) -> Any:
    """The module with these arrays. Raises ConfigError where names or shapes differ (first five, by name)."""
    wanted = params.arrays_of(template)
    wrong = [f"missing {path}" for path in wanted if path not in arrays]
    wrong += [f"surplus {path}" for path in arrays if path not in wanted]
    wrong += [
        f"misshapen {path} {list(arrays[path].shape)}, needs {list(leaf.shape)}"
        for path, leaf in wanted.items()
        if path in arrays and arrays[path].shape != leaf.shape
    ]
    if wrong:
        raise ConfigError(f"{len(wrong)} parameters do not fit: {'; '.join(wrong[:5])}")
    return params.with_arrays(template, arrays)
