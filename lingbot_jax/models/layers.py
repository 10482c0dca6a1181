"""The small layers of the world model: linear, norms, two-layer MLP, patches, time embedding.

A layer computes in the dtype of its input; parameters are float32. Norms return float32, because the
modulation that follows them is float32 as well.

Initialisation as published: Xavier-uniform matrices with zero biases, normal(0.02) in the text and time
embeddings (set where those are made).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32

from lingbot_jax import axes as ax
from lingbot_jax.models.params import Initializer, ones, param, zeros
from lingbot_jax.models.rope import cos_sin
from lingbot_jax.parallel.sharding import gathered, is_split, linear, matmul, precision_of

Activation = Callable[[jax.Array], jax.Array]
Block = Callable[
    [jax.Array, Any], tuple[jax.Array, Any]
]  # (stream, parameters) -> stream, and something else


def xavier(key: jax.Array, shape: Sequence[int], dtype=jnp.float32) -> jax.Array:
    """Xavier-uniform over a kernel whose last axis is the output and all others are inputs."""
    limit = math.sqrt(6 / (math.prod(shape[:-1]) + shape[-1]))
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def gelu(x: jax.Array) -> jax.Array:
    """Tanh-approximated GELU, as published."""
    return jax.nn.gelu(x, approximate=True)


class Linear(nnx.Module):
    """x W + b, and a low-rank adapter's share where there is one (`lora.adapted`)."""

    lora: nnx.Module | None = None

    def __init__(
        self, key: jax.Array, sizes: tuple[int, int], axes: tuple[str, str], init: Initializer = xavier
    ):
        self.kernel = param(key, sizes, axes, init)
        self.bias = param(key, sizes[1:], axes[1:], zeros)

    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        y = linear(x, self.kernel) + gathered(self.bias, x.dtype)
        return y if self.lora is None else y + self.lora(x)


class Mlp(nnx.Module):
    """Linear, activation, linear; sizes (in, hidden, out)."""

    def __init__(
        self,
        key: jax.Array,
        sizes: tuple[int, int, int],
        activation: Activation,
        axes: tuple[str, str] = (ax.EMBED, ax.MLP),
        init: Initializer = xavier,
    ):
        """`axes`: logical axes of the first matrix; the second is (MLP, EMBED)."""
        up, down = jax.random.split(key)
        self.up = Linear(up, sizes[:2], axes, init)
        self.down = Linear(down, sizes[1:], (ax.MLP, ax.EMBED), init)
        self.activation = activation

    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        return self.down(self.activation(self.up(x)))


def layer_norm(x: Float[Array, "*n d"], eps: float) -> Float32[Array, "*n d"]:
    """LayerNorm over the last axis without scale and bias, in float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
    """LayerNorm with scale and bias, in float32."""

    def __init__(self, key: jax.Array, dim: int, eps: float):
        self.scale = param(key, (dim,), (ax.NORM,), ones)
        self.bias = param(key, (dim,), (ax.NORM,), zeros)
        self.eps = eps

    def __call__(self, x: Float[Array, "*n d"]) -> Float32[Array, "*n d"]:
        return layer_norm(x, self.eps) * gathered(self.scale) + gathered(self.bias)


class RMSNorm(nnx.Module):
    """RMSNorm with a scale, in float32. The published q and k norms run over all heads at once."""

    def __init__(self, key: jax.Array, dim: int, eps: float):
        self.scale = param(key, (dim,), (ax.NORM,), ones)
        self.eps = eps

    def __call__(self, x: Float[Array, "*n d"]) -> Float32[Array, "*n d"]:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps) * gathered(self.scale)


def patchify(x: Float[Array, "b t h w c"], patch: tuple[int, int, int]) -> Float[Array, "b t p i"]:
    """Tokens of a latent frame in row-major order; features of a token: row, column, then channel."""
    _, rows, columns = patch
    return rearrange(x, "b t (h r) (w s) c -> b t (h w) (r s c)", r=rows, s=columns)


def unpatchify(
    x: Float[Array, "b t p i"], height: int, width: int, patch: tuple[int, int, int]
) -> Float[Array, "b t h w c"]:
    """Inverse of `patchify`; height and width in latent pixels."""
    _, r, s = patch
    h, w = height // r, width // s
    return rearrange(x, "b t (h w) (r s c) -> b t (h r) (w s) c", h=h, w=w, r=r, s=s)


class PatchEmbedding(nnx.Module):
    """Linear over patches of channels-last latents.

    The kernel is `[taps channels dim]`, so that the parts of the input which are known at different times
    (noisy latent, conditioning) are projected separately: their projections add up.
    """

    def __init__(self, key: jax.Array, channels: int, dim: int, patch: tuple[int, int, int]):
        self.kernel = param(key, (math.prod(patch), channels, dim), (None, ax.INPUT, ax.EMBED), xavier)
        self.bias = param(key, (dim,), (ax.EMBED,), zeros)
        self.patch = patch

    def project(self, x: Float[Array, "b t h w c"], first: int = 0) -> Float[Array, "b t p d"]:
        """Projects the channels `first : first + c` of the input, without the bias."""
        kernel = gathered(self.kernel, x.dtype)[:, first : first + x.shape[-1]]
        kernel = kernel.reshape(-1, kernel.shape[-1])
        patches = patchify(x, self.patch)
        # Split over devices, p must not be joined with other axes.
        if is_split():
            return jnp.matmul(patches, kernel, precision=precision_of(x.dtype))
        return matmul(patches, kernel)

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t p d"]:
        return self.project(x) + gathered(self.bias, x.dtype)


def sinusoid(timestep: Float[Array, "*n"], features: int) -> Float32[Array, "*n features"]:
    """Sinusoidal features of a timestep in [0, 1000], cosines first; exponents -i / half, base 10000."""
    half = features // 2
    cos, sin = cos_sin(timestep, np.power(10000.0, -np.arange(half) / half))
    return jnp.concatenate([cos, sin], -1)


@jax.custom_vjp
def _stand_in(kept: jax.Array, x: jax.Array) -> jax.Array:
    """`kept`, which is x rounded, in x's dtype; the gradient goes to x, unrounded."""
    return kept.astype(x.dtype)


# Forward, x is not read, so that rematerialisation does not keep it.
_stand_in.defvjp(lambda kept, x: (kept.astype(x.dtype), None), lambda _, g: (None, g))


def rematerialised(body: Block, policy: str, dtype: str) -> Block:
    """Wraps a block; what each policy keeps between forward and backward:

    none: everything. full: the input of each block. dots: outputs of the matrix products as well.
    offload: the input of each block, in host memory.

    A stream wider than `dtype` is kept in `dtype`. The block then sees the rounded stream, forward and backward, and
    what it adds goes to the exact one: no rounding is carried on, neither of the stream nor of its gradient.
    """
    policies = jax.checkpoint_policies
    if policy == "none":
        return body
    keep = {
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["block_input"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
    stop = jax.lax.stop_gradient

    def named(kept, x, layer):
        return body(_stand_in(checkpoint_name(kept, "block_input"), x), layer)

    # Inside a scan XLA cannot merge the recomputation with the forward pass, so CSE needs no barrier.
    named = jax.checkpoint(named, policy=keep[policy], prevent_cse=False)

    def run(x, layer):
        kept = stop(x.astype(min(x.dtype, jnp.dtype(dtype), key=lambda d: d.itemsize)))
        y, rest = named(kept, x, layer)
        return y + stop(x - kept), rest

    return run
