"""FLOPs of a WorldDiT from its sizes: 2 per multiply-add of its matrix products, recomputation not counted."""

import dataclasses

from lingbot_jax.models.config import DiTConfig


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one pass over one sample.

    Attributes:
      tokens: products of video tokens with weights. adapters: those with weights of the adapters.
      text: products of text tokens with weights; every device of `seq` repeats them.
      cross: cross-attention's scores and values. attention: self-attention's.
    """

    tokens: int
    adapters: int
    text: int
    cross: int
    attention: int

    @property
    def total(self) -> int:
        return self.products + self.attention

    @property
    def products(self) -> int:
        """All but self-attention, which kernels compute."""
        return self.tokens + self.adapters + self.text + self.cross

    def backward(self, adapters_only: bool = False) -> "Flops":
        """Of the backward pass that follows this forward pass.

        A product has two gradients, of its input and of its weights. Where only the adapters train, frozen weights
        have none, and text, which is computed from nothing that trains, has neither: nor have the keys and values
        that cross-attention makes of it.
        """
        if not adapters_only:
            return Flops(*(2 * value for value in dataclasses.astuple(self)))
        return Flops(
            tokens=self.tokens,
            adapters=2 * self.adapters,
            text=0,
            cross=self.cross,
            attention=2 * self.attention,
        )


def forward_flops(network: DiTConfig, frames: int, height: int, width: int) -> Flops:
    """FLOPs of a forward pass of one sample.

    Args:
      frames, height, width: of the latents.
    """
    _, rows, columns = network.patch
    d, text = network.dim, network.text_len
    n = frames * (height // rows) * (width // columns)
    taps = rows * columns
    block = 4 * d * d + 2 * d * d + 2 * d * network.ffn  # self-attention, cross-attention q and o, FFN
    outside = d * taps * (network.in_channels + network.latent_channels)
    adapters = network.layers * 4 * d * d + taps * network.control_channels * d + 2 * d * d
    return Flops(
        tokens=2 * n * (network.layers * block + outside),
        adapters=2 * n * adapters if network.control != "none" else 0,
        text=2 * text * (network.layers * 2 * d * d + network.text_dim * d + d * d),
        cross=network.layers * 4 * n * text * d,
        attention=network.layers * 4 * n * n * d,
    )


def training_flops(
    network: DiTConfig, frames: int, height: int, width: int, *, adapters_only: bool = False
) -> float:
    """Model FLOPs of one update per sample: forward and backward, rematerialisation not counted.

    Three forward passes where every parameter trains, less where only the adapters do (`Flops.backward`).

    Args:
      frames, height, width: of the latents.
    """
    forward = forward_flops(network, frames, height, width)
    return float(forward.total + forward.backward(adapters_only).total)
