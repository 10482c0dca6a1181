"""The adversarial head: does a video look recorded, told from the features of the fake-score network (paper section
3.4.2, Figure 6b; the head follows APT).

At each named depth a few learned queries look at the tokens of all latent frames by cross-attention; what they find,
depth after depth side by side, is classified by one linear layer: one logit per video, positive for recorded. The
noise level, the keys and the prompt are in the features, so the head is not told of them again.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32
from pydantic import Field

from lingbot_jax import axes as ax
from lingbot_jax.config import Count, PositiveInt, config, require
from lingbot_jax.models.config import DiTConfig, Size
from lingbot_jax.models.layers import LayerNorm, Linear, Mlp, gelu, layer_norm
from lingbot_jax.models.params import normal, param, stack, zeros
from lingbot_jax.parallel.sharding import gathered, precision_of


@config
class DiscriminatorConfig:
    """The adversarial head."""

    depths: tuple[Count, ...] = Field(
        (15, 25, 35), description="blocks, from 0, whose output it reads; APT's third, half and end of 40"
    )
    queries: PositiveInt = Field(1, description="learned query tokens per depth")
    width: Size = Field(1024, description="of the queries and the attention")
    heads: Size = Field(8, description="attention heads")

    def __post_init__(self):
        rising = bool(self.depths) and list(self.depths) == sorted(set(self.depths))
        require(rising, "depths", self.depths, "must name at least one block, in rising order")
        require(self.width % self.heads == 0, "heads", self.heads, f"must divide width = {self.width}")

    def check(self, network: DiTConfig) -> None:
        """Raises ConfigError unless the network has blocks of these depths."""
        ok = self.depths[-1] < network.layers
        require(ok, "depths", self.depths, f"the network has blocks 0..{network.layers - 1}")


class Readout(nnx.Module):
    """Queries that look at the features of one depth: cross-attention, then a feed-forward layer, both residual."""

    def __init__(self, config: DiscriminatorConfig, dim: int, eps: float, key: jax.Array):
        queries, q, k, v, o, mlp = jax.random.split(key, 6)
        width = config.width
        self.queries = param(queries, (config.queries, width), (None, ax.NORM), normal(0.02))
        self.norm = LayerNorm(key, dim, eps)  # depths differ in scale by orders of magnitude
        self.q = Linear(q, (width, width), (ax.EMBED, ax.HEADS))
        self.k = Linear(k, (dim, width), (ax.EMBED, ax.HEADS))
        self.v = Linear(v, (dim, width), (ax.EMBED, ax.HEADS))
        self.o = Linear(o, (width, width), (ax.HEADS, ax.EMBED))
        self.mlp = Mlp(mlp, (width, 4 * width, width), gelu)
        self.heads, self.eps = config.heads, eps

    def __call__(self, features: Float[Array, "b t p d"]) -> Float32[Array, "b q i"]:
        tokens = self.norm(features).astype(features.dtype)
        heads = lambda x: x.reshape(*x.shape[:-1], self.heads, -1)
        x = gathered(self.queries)
        x = jnp.broadcast_to(x, (features.shape[0], *x.shape))
        q = heads(self.q(layer_norm(x, self.eps).astype(tokens.dtype)))
        k, v = heads(self.k(tokens)), heads(self.v(tokens))
        # Frames and their tokens stay apart: under a mesh the tokens are split, and joining would gather them.
        product = functools.partial(jnp.einsum, precision=precision_of(q.dtype))
        scores = product("bqhk,btphk->bhqtp", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=(-2, -1)).astype(v.dtype)
        found = product("bhqtp,btphk->bqhk", weights, v)
        x = x + self.o(found.reshape(*found.shape[:2], -1)).astype(jnp.float32)
        return x + self.mlp(layer_norm(x, self.eps).astype(tokens.dtype)).astype(jnp.float32)


class Discriminator(nnx.Module):
    """Logits of videos from their features. At the start every logit is 0: chance."""

    def __init__(self, config: DiscriminatorConfig, network: DiTConfig, key: jax.Array):
        """`network`: the fake-score network's config. Raises ConfigError: it has no block of some depth."""
        config.check(network)
        readouts, classify = jax.random.split(key)
        depths, eps = len(config.depths), network.eps
        self.readouts = stack(lambda k: Readout(config, network.dim, eps, k), readouts, depths)
        found = depths * config.queries * config.width
        self.classify = Linear(classify, (found, 1), (ax.EMBED, ax.OUTPUT), zeros)
        self.config, self.eps = config, eps

    def __call__(self, features: Float[Array, "depths b t p d"]) -> Float32[Array, "b"]:
        """One logit per video over all its latent frames; positive: recorded.

        To train the head hand it `stop_gradient(features)`; to train a student, features of its noised samples
        (`WorldDiT(..., depths=config.depths)`) through which the gradient reaches them.
        """
        _, found = jax.lax.scan(lambda _, layer: (None, layer[0](layer[1])), None, (self.readouts, features))
        flat = jnp.moveaxis(found, 0, 1).reshape(features.shape[1], -1)
        return self.classify(layer_norm(flat, self.eps))[:, 0]
