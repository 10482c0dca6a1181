"""WorldDiT: the velocity of noisy latents, given text, control, conditioning frames and a noise level per frame.

One network for training, cached generation and distillation: `attend` says what sees what, `positions` where
the frames are in time, `precompute` takes out what does not depend on the noise level.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from kernels_pallas.context import Context
from lingbot_jax import axes as ax
from lingbot_jax.axes import Placeholder
from lingbot_jax.config import require
from lingbot_jax.models import rope
from lingbot_jax.models.attention import KV, Attend, CrossAttention, SelfAttention
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.control import ControlEmbedding, ControlInjection, inject
from lingbot_jax.models.layers import (
    LayerNorm,
    Linear,
    Mlp,
    PatchEmbedding,
    gelu,
    layer_norm,
    rematerialised,
    sinusoid,
    unpatchify,
)
from lingbot_jax.models.params import normal, param, stack, zeros
from lingbot_jax.parallel.sharding import constrain_tokens, gathered

AnyArray = Array | np.ndarray
Features = Float[Array, "depths b t p d"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condition:
    """Everything the velocity depends on besides the noisy latent and its noise level.

    Attributes:
      text: zero-padded text tokens; with an axis n, one text for each of the n equal parts of the latent frames.
      control: camera / action embedding (channel = c * stride^2 + stride * row + column); None: the adapters are
        not applied.
      mask: one where the pixel frame is a conditioning frame.
      image: latent of the conditioning frames followed by mid-grey ones.
        Mask and image are there if and only if the model has `image_condition`.
    """

    text: Float[AnyArray, "b *n l text_dim"] | Placeholder
    control: Float[AnyArray, "b t h w control_channels"] | Placeholder = None
    mask: Float[AnyArray, "b t h w mask_channels"] | Placeholder = None
    image: Float[AnyArray, "b t h w c"] | Placeholder = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextPart:
    """Keys and values of the text in the cross-attention of one block, or of all of them, stacked."""

    keys: Float[Array, "*layers_b_n l h k"] | Placeholder
    values: Float[Array, "*layers_b_n l h k"] | Placeholder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ControlPart:
    """Scale and shift of the control injection of one block, or of all of them, stacked."""

    scale: Float[Array, "*layers b t p d"] | Placeholder
    shift: Float[Array, "*layers b t p d"] | Placeholder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prepared:
    """A condition after `WorldDiT.precompute`: what every denoising step would compute again.

    Attributes:
      text: of every layer; the only part that differs between the branches of guidance.
      control: of every layer, or None without control.
      base: conditioning half of the patch embedding, or None without image conditioning.
    """

    text: TextPart
    control: ControlPart | None
    base: Float[Array, "b t p d"] | Placeholder


class TimeEmbedding(nnx.Module):
    """Timestep -> embedding for the head and six modulation vectors for the blocks, all float32."""

    def __init__(self, config: DiTConfig, key: jax.Array):
        mlp, projection = jax.random.split(key)
        sizes = (config.freq_dim, config.dim, config.dim)
        self.mlp = Mlp(mlp, sizes, jax.nn.silu, (ax.INPUT, ax.EMBED), normal(0.02))
        self.projection = Linear(projection, (config.dim, 6 * config.dim), (ax.EMBED, ax.MLP))
        self.features = config.freq_dim

    def __call__(
        self, timestep: Float[Array, "*n"]
    ) -> tuple[Float32[Array, "*n d"], Float32[Array, "*n six d"]]:
        embedded = self.mlp(sinusoid(timestep, self.features))
        return embedded, self.projection(jax.nn.silu(embedded)).reshape(*timestep.shape, 6, -1)


class Block(nnx.Module):
    """Self-attention, control injection, cross-attention to text, feed-forward."""

    def __init__(self, config: DiTConfig, key: jax.Array):
        keys = jax.random.split(key, 5)
        # Published initialisation of modulation: standard normal / sqrt(dim).
        self.modulation = param(keys[0], (6, config.dim), (None, ax.NORM), normal(config.dim**-0.5))
        self.self_attention = SelfAttention(config, keys[1])
        self.cross_norm = LayerNorm(keys[2], config.dim, config.eps)
        self.cross_attention = CrossAttention(config, keys[2])
        self.ffn = Mlp(keys[3], (config.dim, config.ffn, config.dim), gelu)
        if config.control != "none":
            self.control = ControlInjection(config, keys[4])
        self.config = config

    def prepare_text(self, text: Float[Array, "*b l d"]) -> TextPart:
        """What this block needs of the embedded text."""
        return TextPart(*self.cross_attention.text(text))

    def prepare_control(self, control: Float[Array, "b t p d"] | None) -> ControlPart | None:
        """What this block needs of the control tokens."""
        return None if control is None else ControlPart(*self.control(control))

    def __call__(
        self,
        x: Float[Array, "b t p d"],
        time: Float32[Array, "b t #p 6 d"],
        text: TextPart,
        control: ControlPart | None,
        table: rope.Rotary,
        attend: Attend,
        context: Context | None,
    ) -> tuple[Float[Array, "b t p d"], tuple[Array, Array]]:
        """Returns tokens, and the self-attention's keys (normed, not rotated) and values `b t p h k`.

        The stream x keeps its dtype, `residual_dtype`; what enters a product is rounded to `dtype`.
        """
        eps, dtype, stream = self.config.eps, self.config.dtype, x.dtype
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = jnp.moveaxis(
            gathered(self.modulation) + time, -2, 0
        )

        y = (layer_norm(x, eps) * (1 + scale_a) + shift_a).astype(dtype)
        y, kv = self.self_attention(y, table, attend, context)
        x = (x + y * gate_a).astype(stream)
        if control is not None:
            x = inject(x, control.scale, control.shift)
        y = self.cross_norm(x).astype(dtype)
        x = (x + self.cross_attention(y, text.keys, text.values)).astype(stream)
        y = (layer_norm(x, eps) * (1 + scale_f) + shift_f).astype(dtype)
        x = (x + self.ffn(y) * gate_f).astype(stream)
        return x, kv


class Head(nnx.Module):
    """Modulated norm and projection to patches of the velocity, in float32; zero at the start."""

    def __init__(self, config: DiTConfig, key: jax.Array):
        features = config.latent_channels * config.patch[1] * config.patch[2]
        self.modulation = param(key, (2, config.dim), (None, ax.NORM), normal(config.dim**-0.5))
        self.projection = Linear(key, (config.dim, features), (ax.EMBED, ax.OUTPUT), zeros)
        self.eps = config.eps

    def __call__(
        self, x: Float[Array, "b t p d"], time: Float32[Array, "b t #p d"]
    ) -> Float32[Array, "b t p o"]:
        shift, scale = (row + time for row in gathered(self.modulation))
        return self.projection(layer_norm(x, self.eps) * (1 + scale) + shift)


class WorldDiT(nnx.Module):
    """One expert (paper section 3.2.1). A pure function of its parameters and inputs."""

    def __init__(self, config: DiTConfig, key: jax.Array):
        patch, text, time, control, blocks, head = jax.random.split(key, 6)
        self.patch = PatchEmbedding(patch, config.in_channels, config.dim, config.patch)
        self.text = Mlp(
            text, (config.text_dim, config.dim, config.dim), gelu, (ax.INPUT, ax.EMBED), normal(0.02)
        )
        self.time = TimeEmbedding(config, time)
        if config.control != "none":
            self.control = ControlEmbedding(config, control)
        self.blocks = stack(lambda k: Block(config, k), blocks, config.layers)
        self.head = Head(config, head)
        self.config = config

    def _check(self, condition: Condition) -> None:
        config = self.config
        has = {name: getattr(condition, name) is not None for name in ("mask", "image", "control")}
        for name in ("mask", "image"):
            require(
                has[name] == config.image_condition,
                f"condition.{name}",
                "given" if has[name] else None,
                f"must be given exactly if model.image_condition, which is {config.image_condition}",
            )
        require(
            config.control != "none" or not has["control"],
            "condition.control",
            "given",
            "must be None for model.control = 'none'",
        )
        channels = {"text": config.text_dim, "mask": config.mask_channels, "image": config.latent_channels}
        channels["control"] = config.control_channels
        for name, expected in channels.items():
            value = getattr(condition, name)
            if value is not None:
                require(
                    value.shape[-1] == expected,
                    f"condition.{name} channels",
                    value.shape[-1],
                    f"must be {expected}",
                )

    def embed_text(self, text: Float[AnyArray, "*b l c"]) -> Float[Array, "*b l d"]:
        return self.text(text.astype(self.config.dtype))

    def embed_control(self, control: Float[AnyArray, "b t h w c"] | None) -> Float[Array, "b t p d"] | None:
        return None if control is None else constrain_tokens(self.control(control.astype(self.config.dtype)))

    def embed_conditioning(self, condition: Condition) -> Float[Array, "b t p d"] | None:
        """Conditioning half of the patch embedding: mask and conditioning frames."""
        if condition.image is None:
            return None
        known = jnp.concatenate([condition.mask, condition.image], -1).astype(self.config.dtype)
        return self.patch.project(known, self.config.latent_channels)

    def embed_latents(
        self, latents: Float[Array, "b t h w c"], base: Float[Array, "b t p d"] | None
    ) -> Float[Array, "b t p d"]:
        """Tokens at the entry of the first block: rounded to `dtype`, in the stream's own."""
        tokens = self.patch(latents.astype(self.config.dtype))
        tokens = tokens if base is None else tokens + base
        return tokens.astype(self.config.residual_dtype)

    def precompute(self, condition: Condition) -> Prepared:
        """Everything that does not depend on the noise level: pass it in place of the condition.

        For the same clip under another text, exchange that part: the rest, by far the larger, is shared:
        `dataclasses.replace(prepared, text=network.precompute_text(text))`.
        """
        self._check(condition)
        control = self.embed_control(condition.control)
        per_block = lambda _, block: (None, block.prepare_control(control))
        controls = None if control is None else jax.lax.scan(per_block, None, self.blocks)[1]
        return Prepared(self.precompute_text(condition.text), controls, self.embed_conditioning(condition))

    def precompute_text(self, text: Float[AnyArray, "*b l text_dim"]) -> TextPart:
        """The part of `precompute` that depends on the text."""
        embedded = self.embed_text(text)
        return jax.lax.scan(lambda _, block: (None, block.prepare_text(embedded)), None, self.blocks)[1]

    def __call__(
        self,
        latents: Float[Array, "b t h w c"],
        timestep: Float[Array, "b t"] | Float[Array, "b t p"],
        condition: Condition | Prepared,
        *,
        attend: Attend = Attend(),  # noqa: B008 - frozen
        positions: Int[Array, "t"] | None = None,
        return_kv: bool = False,
        depths: tuple[int, ...] = (),
    ) -> Float32[Array, "b t h w c"] | tuple[Float32[Array, "b t h w c"], KV | Features]:
        """Velocity (noise minus clean latent) of noisy latents.

        Args:
          latents: noisy latents; h and w are multiples of the patch.
          timestep: 1000 x noise fraction, in [0, 1000], of each latent frame (or, rarely, of each token).
          condition: as it is, or precomputed.
          attend: what may attend to what, and how.
          positions: latent frame indices for the rotary time axis; 0, 1, ... if None.
          return_kv: also return the keys and values of all layers, to be cached.
          depths: also return the output of these blocks, counted from 0, `[depths b t p d]`; not with return_kv.

        Raises:
          ConfigError: shapes that do not fit the model.
        """
        config = self.config
        b, t, height, width, channels = latents.shape
        _, rows, columns = config.patch
        require(
            channels == config.latent_channels,
            "latents channels",
            channels,
            f"must be {config.latent_channels}",
        )
        require(height % rows == 0, "latents height", height, f"must be a multiple of the patch, {rows}")
        require(width % columns == 0, "latents width", width, f"must be a multiple of the patch, {columns}")

        if isinstance(condition, Prepared):
            text = control = None
            base, prepared = condition.base, (condition.text, condition.control)
        else:
            self._check(condition)
            text, control = self.embed_text(condition.text), self.embed_control(condition.control)
            base, prepared = self.embed_conditioning(condition), None
        if positions is None:
            positions = jnp.arange(t, dtype=jnp.int32)
        table = rope.rotary(positions, height // rows, width // columns, config.head_dim, config.rope_theta)
        timestep = timestep[..., None] if timestep.ndim == 2 else timestep
        # Where a block's output is kept; those that nobody asked for overwrite each other in a place of their own.
        slots = np.full(config.layers, len(depths))
        slots[list(depths)] = np.arange(len(depths))
        head_time, block_time = self.time(timestep.astype(jnp.float32))

        def run(x, layer):
            block, prepared, cached = layer
            own = (block.prepare_text(text), block.prepare_control(control)) if prepared is None else prepared
            context = None if cached is None else attend.context.layer(*cached)
            x, kv = block(x, block_time, *own, table, attend, context)
            return constrain_tokens(x), kv if return_kv else None

        run = rematerialised(run, config.remat, config.dtype)

        def body(carried, layer):
            (x, features), (*layer, slot) = carried, layer
            x, kv = run(x, layer)
            features = features.at[slot].set(x.astype(features.dtype)) if depths else None
            return (x, features), kv

        cached = None if attend.context is None else (attend.context.keys, attend.context.values)
        x = constrain_tokens(self.embed_latents(latents, base))
        features = jnp.zeros((len(depths) + 1, *x.shape), config.dtype) if depths else None
        layers = (self.blocks, prepared, cached, slots if depths else None)
        (x, features), kv = jax.lax.scan(body, (x, features), layers)
        velocity = unpatchify(self.head(x, head_time), height, width, config.patch)
        if depths:
            return velocity, features[: len(depths)]
        if not return_kv:
            return velocity
        return velocity, KV(*(y.reshape(config.layers, b, -1, *y.shape[-2:]) for y in kv))
