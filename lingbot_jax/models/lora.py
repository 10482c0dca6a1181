"""LoRA (Hu et al. 2021): a frozen linear layer W, and beside it a product A B of low rank that trains.

    y = x W + b + (alpha / rank) (x A) B

B starts at zero, so that nothing changes until it has learnt. Training alone holds W, A and B apart: whoever opens a
run is given W + (alpha / rank) A B in the place of W (`worlds/merging.py`).
"""

import math
import operator
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32
from pydantic import Field

from lingbot_jax import axes as ax
from lingbot_jax.config import Positive, config, require
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.dit import WorldDiT
from lingbot_jax.models.params import param, stack, zeros
from lingbot_jax.parallel.sharding import linear

# fmt: off
LinearName = Literal[
    "self_attention.q", "self_attention.k", "self_attention.v", "self_attention.o",
    "cross_attention.q", "cross_attention.k", "cross_attention.v", "cross_attention.o",
    "ffn.up", "ffn.down",
]
# fmt: on
LINEARS: tuple[LinearName, ...] = LinearName.__args__


@config
class LoraConfig:
    """Low-rank adapters on linear layers of every block; with them nothing else of the network trains."""

    rank: Annotated[int, Field(ge=0, le=4096)] = Field(0, description="of the adapters; 0: no LoRA")
    alpha: Positive | None = Field(
        None, description="the adapters' share of a layer is alpha / rank; None: rank"
    )
    linears: tuple[LinearName, ...] = Field(LINEARS, description="layers of a block that have one")

    def __post_init__(self):
        distinct = 0 < len(set(self.linears)) == len(self.linears)
        require(distinct, "linears", self.linears, "must name one or more layers, each once")
        ok = self.rank > 0 or self.alpha is None
        require(ok, "alpha", self.alpha, "means nothing without rank")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def kernels(self) -> dict[str, tuple[str, str]]:
        """Paths of the adapted matrices, and of A and B of each."""
        layers = [f"blocks.{name}" for name in self.linears]
        return {f"{x}.kernel": (f"{x}.lora.a_kernel", f"{x}.lora.b_kernel") for x in layers}


class Lora(nnx.Module):
    """(alpha / rank) x A B; A as PEFT makes it, uniform within 1 / sqrt(i)."""

    def __init__(self, key: jax.Array, sizes: tuple[int, int], config: LoraConfig):
        self.a_kernel = param(key, (sizes[0], config.rank), (ax.LORA, ax.RANK), _uniform)
        self.b_kernel = param(key, (config.rank, sizes[1]), (ax.RANK, ax.LORA), zeros)
        self.scale = config.scale

    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        return self.scale * linear(linear(x, self.a_kernel), self.b_kernel)


def _uniform(key: jax.Array, shape: Sequence[int], dtype=jnp.float32) -> jax.Array:
    limit = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def is_lora(path: str) -> bool:
    """Whether a parameter, by dotted path, is an A or a B: they sit under a `lora` attribute."""
    return "lora" in path.split(".")


def trains(config: LoraConfig, path: str) -> bool:
    """Whether a parameter of an adapted network trains: A and B alone, or without them everything."""
    return config.rank == 0 or is_lora(path)


def adapted(network: DiTConfig, config: LoraConfig, key: jax.Array) -> WorldDiT:
    """A fresh transformer, with fresh adapters if the rank is not 0; but for those it is the one without them."""
    model = WorldDiT(network, key)
    if not config.rank:
        return model
    keys = jax.random.split(jax.random.fold_in(key, 1), len(config.linears))
    for own, name in zip(keys, config.linears, strict=True):
        layer = operator.attrgetter(name)(model.blocks)
        sizes = layer.kernel.shape[1:]
        layer.lora = stack(lambda k, sizes=sizes: Lora(k, sizes, config), own, network.layers)
    return model


def merged(
    kernel: Float[Array, "layers i o"],
    a: Float[Array, "layers i r"],
    b: Float[Array, "layers r o"],
    scale: float,
) -> Float32[Array, "layers i o"]:
    """W + scale A B, in float32."""
    kernel, a, b = (x.astype(jnp.float32) for x in (kernel, a, b))
    return kernel + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
