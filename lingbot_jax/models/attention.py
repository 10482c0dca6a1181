"""Attention of the world model: `Attend`, self-attention with rotary positions, cross-attention to text.

Tokens are `b t p d`: latent frames, tokens of a frame. The axes stay apart because modulation is per frame, and
because a mesh then shards p: every device holds the same share of every frame, so per-frame values are
local and block-causal work is balanced.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.context import Context
from kernels_pallas.mask import Mask
from kernels_pallas.reference import blocked_attention
from lingbot_jax import axes as ax
from lingbot_jax.axes import Placeholder
from lingbot_jax.config import ConfigError, require
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.layers import Linear, RMSNorm
from lingbot_jax.models.rope import Rotary, rotate
from lingbot_jax.parallel.sharding import platform, precision_of

Heads = Float[Array, "b t p h k"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KV:
    """Keys and values of a forward pass, `[layers b n h k]`: keys are normed but not rotated.

    `rope.rotate` gives them any positions, absolute or relative to a window.
    """

    keys: Float[Array, "layers b n h k"] | Placeholder
    values: Float[Array, "layers b n h k"] | Placeholder


def attend_text(q: Heads, k: Float[Array, "b *n l h k"], v: Float[Array, "b *n l h k"]) -> Heads:
    """softmax(q k^T / sqrt(k)) v with float32 scores. Heads before tokens: XLA:CPU is 2-3 times faster so.

    With an axis n, each of the n equal parts of the latent frames sees a text of its own (paper section 2.3). Frames
    and their tokens stay apart: under a mesh the tokens are split, and merging the axes would gather them.
    """
    if k.ndim == 5:
        n = k.shape[1]
        require(
            q.shape[1] % n == 0, "latent frames", q.shape[1], f"must be a multiple of the {n} texts of a clip"
        )
        parts = q.reshape(q.shape[0], n, -1, *q.shape[2:])
        return jax.vmap(attend_text, in_axes=1, out_axes=1)(parts, k, v).reshape(q.shape)
    q, k, v = jnp.moveaxis(q, 3, 1), k.swapaxes(1, 2), v.swapaxes(1, 2)
    product = functools.partial(jnp.einsum, precision=precision_of(q.dtype))
    scores = product("bhtpk,bhlk->bhtpl", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(scores, -1).astype(v.dtype)
    return jnp.moveaxis(product("bhtpl,bhlk->bhtpk", weights, v), 1, 3)


def attend_local(
    q: Heads, k: Heads, v: Heads, mask: Mask | None = None, context: Context | None = None
) -> Heads:
    """Attention on one device in plain JAX: frames and their tokens are one sequence, frame-major.

    Raises:
      ConfigError: on a TPU, which has kernels.
    """
    if platform() == "tpu":
        raise ConfigError(
            "attend.kernel = attend_local: plain attention on a TPU; pass Attend(kernel=attention_kernel(mesh, heads))"
        )
    flat = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (q, k, v))
    return blocked_attention(*flat, mask, context=context).reshape(q.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attend:
    """What may attend to what, and how; chosen outside the model.

    Attributes:
      mask: of the clip's own t * p tokens in frame-major order, both as queries and keys; None: all see all.
      context: cached keys (rotated) and values `[layers b m h k]`, seen by every query; None: none. No gradient
        goes into it: a cache is a constant, whatever the kernel.
      kernel: `kernel(q, k, v, mask)`, or `kernel(q, k, v, mask, context of the layer)` if there is a context,
        for `b t p h k`; returns the same shape. The default runs on one device in plain JAX.
    """

    mask: Mask | None = dataclasses.field(default=None, metadata={"static": True})
    context: Context | None = None
    kernel: Callable[..., Heads] = dataclasses.field(default=attend_local, metadata={"static": True})

    def __call__(self, q: Heads, k: Heads, v: Heads, context: Context | None) -> Heads:
        """Attention of one layer; `context` is this layer's."""
        if context is None:
            return self.kernel(q, k, v, self.mask)
        return self.kernel(q, k, v, self.mask, jax.lax.stop_gradient(context))


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
        return self.output(attend(q, k, values, context)), (keys, values)


class CrossAttention(_Projections):
    def text(self, text: Float[Array, "*b l d"]) -> tuple[Float[Array, "*b l h k"], Float[Array, "*b l h k"]]:
        """Keys and values of embedded text; independent of the noise level."""
        return self.keys(text), self.values(text)

    def __call__(
        self, x: Float[Array, "b t p d"], keys: Float[Array, "b *n l h k"], values: Float[Array, "b *n l h k"]
    ) -> Float[Array, "b t p d"]:
        """Every token sees every text token; zero-padded ones are not masked, as published."""
        return self.output(attend_text(self.queries(x), keys, values))
