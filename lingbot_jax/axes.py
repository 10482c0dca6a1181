"""The legend of axis letters and the logical axis names of parameters.

Arrays are channels-last; public signatures carry these letters in jaxtyping annotations:

    b  batch                      p  tokens of a latent frame    h  attention heads
    t  latent frames              n  query tokens (t p)          k  head dimension
    f  video frames               m  key tokens, cached slots    d  model width
    h w  height, width, latent    l  text tokens                 c  channels
    H W  height, width, pixels    s  denoising steps             i o  inputs, outputs of a layer

`h` is the height where `w` stands beside it; `hl wl` is the latent's where both are in pixels. Latents are
`b t h w c`, tokens `b t p d`, heads `b t p h k` or, with frames joined, `b n h k`, videos `b f H W 3`.
"""

import jax
import numpy as np


class _NoArray(type):
    def __instancecheck__(cls, value: object) -> bool:
        return not isinstance(value, jax.Array | np.ndarray)


class Placeholder(metaclass=_NoArray):
    """What stands in the place of an array in an abstract tree or a tree of shardings, specs or None.

    Fields of pytrees are `Float[Array, "..."] | Placeholder`: arrays have the shape that stands there.
    """


# Logical axes a parameter may carry. `parallel/sharding.py` maps them to mesh axes in one table.
LAYERS = "layers"  # stacked blocks (the scanned axis)
EMBED = "embed"  # model width
HEADS = "heads"  # heads x head dimension, flattened
MLP = "mlp"  # feed-forward width
INPUT = "input"  # small input features: patches, frequencies, text width
OUTPUT = "output"  # small output features: patches of the velocity, class logits
VOCAB = "vocab"  # token ids
NORM = "norm"  # scales, biases and modulation vectors of norms
KERNEL = "kernel"  # spatial or temporal taps of a convolution
LORA = "lora"  # inputs of A, outputs of B: the wide side of a low-rank adapter
RANK = "rank"  # its narrow side

LOGICAL_AXES = (LAYERS, EMBED, HEADS, MLP, INPUT, OUTPUT, VOCAB, NORM, KERNEL, LORA, RANK)
