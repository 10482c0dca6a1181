"""Camera and key control: tokens from the camera / action embedding, injected into a block (paper section 3.3.2).

The camera / action embedding is `b t h w C*stride^2`: all pixels under a latent pixel as channels
(`control/plucker.py` makes it). All parameters of this file are adapters: the action stage trains adapters and
nothing else.

A freshly made injection has zero scale and shift layers, so that adding adapters to a trained model changes
nothing until they are trained. Everything else is Xavier-uniform as published.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lingbot_jax import axes as ax
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.layers import Linear, Mlp, PatchEmbedding
from lingbot_jax.models.params import zeros


def is_adapter(path: str) -> bool:
    """Whether a parameter, by dotted path, is an adapter's: of this file, or a low-rank one (`lora.py`). They sit under
    an attribute of that name."""
    return not {"control", "lora"}.isdisjoint(path.split("."))


class ControlEmbedding(nnx.Module):
    """Control tokens: linear over patches, then a residual two-layer SiLU MLP."""

    def __init__(self, config: DiTConfig, key: jax.Array):
        patch, mlp = jax.random.split(key)
        self.patch = PatchEmbedding(patch, config.control_channels, config.dim, config.patch)
        self.mlp = Mlp(mlp, (config.dim,) * 3, jax.nn.silu)

    def __call__(self, control: Float[Array, "b t h w c"]) -> Float[Array, "b t p d"]:
        tokens = self.patch(control)
        return tokens + self.mlp(tokens)


class ControlInjection(nnx.Module):
    """Scale and shift of a block from control tokens; independent of the noise level."""

    def __init__(self, config: DiTConfig, key: jax.Array):
        mlp, scale, shift = jax.random.split(key, 3)
        square = (config.dim, config.dim)
        self.mlp = Mlp(mlp, (config.dim,) * 3, jax.nn.silu)
        self.scale = Linear(scale, square, (ax.EMBED, ax.MLP), zeros)
        self.shift = Linear(shift, square, (ax.EMBED, ax.MLP), zeros)

    def __call__(
        self, control: Float[Array, "b t p d"]
    ) -> tuple[Float[Array, "b t p d"], Float[Array, "b t p d"]]:
        hidden = control + self.mlp(control)
        return self.scale(hidden), self.shift(hidden)


def inject(
    x: Float[Array, "b t p d"], scale: Float[Array, "b t p d"], shift: Float[Array, "b t p d"]
) -> Float[Array, "b t p d"]:
    """(1 + scale) x + shift, in float32; 1 + scale is rounded to scale's dtype, as published."""
    return ((1 + scale).astype(jnp.float32) * x + shift).astype(x.dtype)
