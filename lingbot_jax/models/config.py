"""Sizes of the world's networks: transformer, codec, text encoder."""

import math
from typing import Annotated, Literal

from pydantic import Field

from lingbot_jax.config import Fraction, Inside, Number, Positive, PositiveInt, config, require
from lingbot_jax.control.plucker import CONTROL_CHANNELS, Control

DType = Literal["float32", "bfloat16"]
Size = Annotated[
    int, Field(gt=0, le=2**20)
]  # of a network: far above any, far below what a slip would allocate


@config
class DiTConfig:
    """One WorldDiT. Defaults are the published constants (docs: FACTS of the A14B model)."""

    dim: Size = Field(description="model width D")
    layers: Annotated[int, Field(gt=0, le=4096)] = Field(description="blocks")
    heads: Size = Field(description="attention heads; head_dim = dim / heads, even, at least 6")
    ffn: Size = Field(description="feed-forward width")
    freq_dim: Size = Field(256, description="sinusoid features of the timestep, even")
    text_dim: Size = Field(4096, description="width of the text tokens")
    text_len: Size = Field(512, description="text tokens, zero-padded")
    latent_channels: Size = Field(16, description="channels of a latent pixel (16: the Wan 2.1 VAE)")
    image_condition: bool = Field(True, description="the input also has a mask and a conditioning latent")
    mask_channels: Annotated[int, Field(gt=0, le=1024)] = Field(
        4, description="channels of the conditioning mask: the codec's temporal stride"
    )
    spatial_stride: Annotated[int, Field(gt=0, le=1024)] = Field(
        8,
        description="pixels per latent pixel, which the camera embedding carries as channels (8: 64 per channel)",
    )
    control: Control = Field(
        "cam", description="what the camera / action embedding holds, see CONTROL_CHANNELS"
    )
    patch: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(
        (1, 2, 2), description="latent pixels (time, height, width) of a token; time is 1"
    )
    eps: Inside = Field(1e-6, description="of every norm")
    rope_theta: Annotated[Positive, Field(ge=1)] = Field(
        10000.0, description="base of the rotary frequencies"
    )
    dtype: DType = Field(
        "bfloat16", description="of matrix products and activations; norms, modulation, angles are float32"
    )
    residual_dtype: DType = Field(
        "float32", description="of the residual stream, which the blocks add to (float32 as published)"
    )
    remat: Literal["none", "full", "dots", "offload"] = Field(
        "none",
        description="rematerialisation of the scanned blocks: what is kept between forward and backward",
    )

    def __post_init__(self):
        require(self.dim % self.heads == 0, "heads", self.heads, f"must divide dim = {self.dim}")
        even = self.head_dim % 2 == 0 and self.head_dim >= 6
        require(
            even, "heads", self.heads, f"head_dim = dim / heads = {self.head_dim} must be even and at least 6"
        )
        require(self.freq_dim % 2 == 0, "freq_dim", self.freq_dim, "must be even")
        require(self.patch[0] == 1, "patch", self.patch, "the time patch must be 1")
        require(max(self.patch) <= 64, "patch", self.patch, "must be at most 64 latent pixels")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def in_channels(self) -> int:
        """Noisy latent, then mask and conditioning latent."""
        return self.latent_channels + (self.mask_channels + self.latent_channels) * self.image_condition

    @property
    def control_channels(self) -> int:
        """Channels of the camera embedding per latent pixel: stride^2 pixels x C, channel outermost."""
        return CONTROL_CHANNELS[self.control] * self.spatial_stride**2


# Named sizes: Wan 2.1 1.3B geometry, and one A14B expert (two of them make LingBot-World).
W1_3B = DiTConfig(dim=1536, layers=30, heads=12, ffn=8960)
W14B = DiTConfig(dim=5120, layers=40, heads=40, ffn=13824)


class _Strided:
    """What every codec's config knows besides its fields."""

    @property
    def stride(self) -> tuple[int, int, int]:
        """Pixels of (time, height, width) that one latent pixel stands for."""
        raise NotImplementedError

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a video of st*n + 1 frames (4n + 1 of the published codec). Raises ConfigError."""
        st = self.stride[0]
        require(frames > 0 and frames % st == 1 % st, "frames", frames, f"must be {st}n + 1")
        return 1 + (frames - 1) // st

    def video_frames(self, latent_frames: int) -> int:
        """The inverse of `latent_frames`."""
        return self.stride[0] * (latent_frames - 1) + 1


Stride = Annotated[int, Field(gt=0, le=64)]


@config
class LinearCodecConfig(_Strided):
    """Principal components of space-time patches (`codec.LinearCodec`)."""

    kind: Literal["linear"] = Field("linear", description="which codec")
    channels: Size = Field(24, description="latent channels")
    strides: tuple[Stride, Stride, Stride] = Field(
        (4, 8, 8), description="pixels (time, height, width) of a latent"
    )

    def __post_init__(self):
        features = 3 * math.prod(self.strides)
        require(self.channels <= features, "channels", self.channels, f"must be in 1..{features}")

    @property
    def stride(self) -> tuple[int, int, int]:
        return self.strides


@config
class ConvCodecConfig(_Strided):
    """Principal components, and a decoder that sees across the borders of patches (`conv_codec.ConvCodec`)."""

    kind: Literal["conv"] = Field("conv", description="which codec")
    channels: Size = Field(64, description="latent channels")
    strides: tuple[Stride, Stride, Stride] = Field(
        (4, 8, 8), description="pixels (time, height, width) of a latent; the last two even"
    )
    width: Size = Field(64, description="channels of the decoder's convolutions")
    blocks: Stride = Field(3, description="of the decoder")
    whitening: Fraction = Field(
        0.5, description="0: latents keep the proportions of pixels; 1: every component has variance 1"
    )

    def __post_init__(self):
        features = 3 * math.prod(self.strides)
        require(self.channels <= features, "channels", self.channels, f"must be in 1..{features}")
        even = self.strides[1] % 2 == 0 and self.strides[2] % 2 == 0
        require(even, "strides", self.strides, "those of height and width must be even")

    @property
    def stride(self) -> tuple[int, int, int]:
        return self.strides


# fmt: off
# Published moments of the 16 latent channels over the training videos.
MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
       3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on


@config
class VAEConfig(_Strided):
    """The Wan VAE (`vae.WanVAE`). Defaults are the published Wan 2.1 VAE."""

    kind: Literal["wan_vae"] = Field("wan_vae", description="which codec")
    width: Size = Field(96, description="channels at full resolution")
    mults: tuple[Stride, ...] = Field((1, 2, 4, 4), description="width of each level over `width`")
    blocks: Stride = Field(2, description="residual blocks per level (the decoder has one more)")
    time_strides: tuple[bool, ...] = Field(
        (False, True, True), description="whether the step to the next level also halves the frame rate"
    )
    channels: Size = Field(16, description="latent channels")
    mean: tuple[Number, ...] = Field(
        MEAN, description="of the raw latent's channels: codec latent = (raw - mean) / std"
    )
    std: tuple[Positive, ...] = Field(STD, description="of the raw latent's channels")
    dtype: DType = Field("float32", description="compute dtype; norms and softmax are float32 always")

    def __post_init__(self):
        levels = len(self.mults)
        require(1 <= levels <= 8, "mults", self.mults, "must name 1 to 8 levels")
        ok = len(self.time_strides) == levels - 1
        require(
            ok, "time_strides", self.time_strides, f"needs one entry between each two of the {levels} levels"
        )
        for name in ("mean", "std"):
            value = getattr(self, name)
            require(len(value) == self.channels, name, value, f"needs {self.channels} channels")

    @property
    def stride(self) -> tuple[int, int, int]:
        space = 2 ** len(self.time_strides)
        return (2 ** sum(self.time_strides), space, space)


CodecConfig = Annotated[LinearCodecConfig | ConvCodecConfig | VAEConfig, Field(discriminator="kind")]


@config
class NgramConfig:
    """Hashed word features, without weights (`text.HashedNgramEncoder`)."""

    kind: Literal["ngram"] = Field("ngram", description="which text encoder")
    dim: Size = Field(64, description="width of a text token")
    length: Size = Field(32, description="text tokens per text, padding included")


@config
class UMT5Config:
    """The umT5 encoder (`text.UMT5Encoder`). Defaults are the published umT5-xxl encoder."""

    kind: Literal["umt5"] = Field("umt5", description="which text encoder")
    vocab: Size = Field(256384, description="token ids")
    dim: Size = Field(4096, description="model width")
    heads: Size = Field(64, description="attention heads")
    head_dim: Size = Field(64, description="of the attention, whose width is heads x head_dim")
    ffn: Size = Field(10240, description="feed-forward width")
    layers: Annotated[int, Field(gt=0, le=4096)] = Field(24, description="blocks")
    buckets: Annotated[int, Field(ge=4, le=4096, multiple_of=4)] = Field(
        32, description="of the relative position bias; each layer has its own table"
    )
    max_distance: Size = Field(128, description="largest distance that the position bias tells apart")
    eps: Inside = Field(1e-6, description="of every norm")
    length: Size = Field(512, description="tokens per text")
    dtype: DType = Field("bfloat16", description="compute dtype; norms and softmax are float32 always")

    def __post_init__(self):
        near = self.buckets // 4
        require(self.max_distance > near, "max_distance", self.max_distance, f"must exceed {near}")


TextConfig = Annotated[NgramConfig | UMT5Config, Field(discriminator="kind")]
