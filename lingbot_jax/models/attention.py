"""Attention of the world model: `Attend`, self-attention with rotary positions, cross-attention to text.

Tokens are `b t p d`: latent frames, tokens of a frame. The axes stay apart because modulation is per frame, and
because a mesh then shards p: every device holds the same share of every frame, so per-frame values are
local and block-causal work is balanced.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels_pallas.mask import Mask
from lingbot_jax import axes as ax
from lingbot_jax.config import DiTConfig
from lingbot_jax.models.layers import Linear, RMSNorm
from lingbot_jax.models.rope import Rotary, rotate

Heads = Float[Array, "b t p h k"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Cached keys and values that every query sees, besides its own clip's under the mask.

    Attributes:
      keys, values: `[layers b m h k]`, keys already rotated. In a layer, without the first axis.
      spans: int32 `[3 2]`, half-open intervals of valid slots, data not shape (sink, and the one or two parts
        of a ring); an empty span has equal ends. Spans must not overlap.
    """

    keys: Array
    values: Array
    spans: Int[Array, "3 2"]

    def layer(self, keys: Float[Array, "b m h k"], values: Float[Array, "b m h k"]) -> "Context":
        """The context of one layer, from its slices of keys and values."""
        return Context(keys, values, self.spans)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KV:
    """Keys and values of a forward pass, `[layers b n h k]`: keys are normed but not rotated.

    `rope.rotate` gives them any positions, absolute or relative to a window.
    """

    keys: Array
    values: Array


def attend_dense(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    visible: jax.Array | None = None,
) -> Float[Array, "b n h k"]:
    """softmax(q k^T / sqrt(k)) v in float32 scores; `visible` is bool, broadcast to `[n m]`.

    Heads go before tokens: the other orders are two to three times slower on CPUs.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    scores = jnp.einsum("bhnk,bhmk->bhnm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if visible is not None:
        scores = jnp.where(visible, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, -1).astype(v.dtype)
    return jnp.einsum("bhnm,bhmk->bhnk", weights, v).swapaxes(1, 2)


def attend_local(q: Heads, k: Heads, v: Heads, mask: Mask | None, context: Context | None) -> Heads:
    """Attention of one device: frames and their tokens are one sequence, frame-major."""
    flat = [x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (q, k, v)]
    n = flat[0].shape[1]
    visible = None if mask is None else jnp.asarray(mask.dense())
    if context is not None:
        slots = jnp.arange(context.keys.shape[1])
        valid = ((slots >= context.spans[:, :1]) & (slots < context.spans[:, 1:])).any(0)
        own = jnp.ones((n, n), bool) if visible is None else visible
        visible = jnp.concatenate([jnp.broadcast_to(valid, (n, len(slots))), own], 1)
        flat[1] = jnp.concatenate([context.keys, flat[1]], 1)
        flat[2] = jnp.concatenate([context.values, flat[2]], 1)
    return attend_dense(*flat, visible).reshape(q.shape)


def identity(tokens: Float[Array, "b t p d"]) -> Float[Array, "b t p d"]:
    return tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attend:
    """What may attend to what, and how; chosen outside the model.

    Attributes:
      mask: of the clip's own t * p tokens in frame-major order, both as queries and keys; None: all see all.
      context: cached keys and values, seen by every query; None: none.
      kernel: `kernel(q, k, v, mask, context of the layer)` for `b t p h k`, returns the same shape. The default
        runs on one device in plain JAX. Under a mesh it is a `shard_map` with p sharded.
      constrain: applied to tokens `b t p d` at block boundaries; under a mesh a `with_sharding_constraint`.
    """

    mask: Mask | None = dataclasses.field(default=None, metadata={"static": True})
    context: Context | None = None
    kernel: Callable[[Heads, Heads, Heads, Mask | None, Context | None], Heads] = dataclasses.field(
        default=attend_local, metadata={"static": True}
    )
    constrain: Callable[[jax.Array], jax.Array] = dataclasses.field(
        default=identity, metadata={"static": True}
    )


class _Projections(nnx.Module):
    """q, k, v and output projections with full-width RMSNorm of q and k."""

    def __init__(self, config: DiTConfig, key: jax.Array):
        q, k, v, o = jax.random.split(key, 4)
        square = (config.dim, config.dim)
        self.q = Linear(q, square, (ax.EMBED, ax.HEADS))
        self.k = Linear(k, square, (ax.EMBED, ax.HEADS))
        self.v = Linear(v, square, (ax.EMBED, ax.HEADS))
        self.o = Linear(o, square, (ax.HEADS, ax.EMBED))
        self.norm_q = RMSNorm(key, config.dim, config.eps)
        self.norm_k = RMSNorm(key, config.dim, config.eps)
        self.heads = config.heads

    def split(self, x: Float[Array, "*n d"], dtype) -> Float[Array, "*n h k"]:
        return x.reshape(*x.shape[:-1], self.heads, -1).astype(dtype)

    def queries(self, x: Float[Array, "*n d"]) -> Float[Array, "*n h k"]:
        return self.split(self.norm_q(self.q(x)), x.dtype)

    def keys(self, x: Float[Array, "*n d"]) -> Float[Array, "*n h k"]:
        return self.split(self.norm_k(self.k(x)), x.dtype)

    def values(self, x: Float[Array, "*n d"]) -> Float[Array, "*n h k"]:
        return self.split(self.v(x), x.dtype)

    def output(self, x: Float[Array, "*n h k"]) -> Float[Array, "*n d"]:
        return self.o(x.reshape(*x.shape[:-2], -1))


class SelfAttention(_Projections):
    def __call__(
        self, x: Float[Array, "b t p d"], table: Rotary, attend: Attend, context: Context | None
    ) -> tuple[Float[Array, "b t p d"], tuple[Heads, Heads]]:
        """Returns the projected output, and the keys (normed, not rotated) and values."""
        keys, values = self.keys(x), self.values(x)
        q, k = rotate(self.queries(x), table), rotate(keys, table)
        return self.output(attend.kernel(q, k, values, attend.mask, context)), (keys, values)


class CrossAttention(_Projections):
    def text(self, text: Float[Array, "b l d"]) -> tuple[Float[Array, "b l h k"], Float[Array, "b l h k"]]:
        """Keys and values of embedded text; independent of the noise level."""
        return self.keys(text), self.values(text)

    def __call__(
        self, x: Float[Array, "b t p d"], keys: Float[Array, "b l h k"], values: Float[Array, "b l h k"]
    ) -> Float[Array, "b t p d"]:
        """Every token sees every text token; zero-padded ones are not masked, as published."""
        q = self.queries(x)
        flat = q.reshape(q.shape[0], -1, *q.shape[3:])
        return self.output(attend_dense(flat, keys, values).reshape(q.shape))
