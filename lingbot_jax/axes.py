"""The legend of axis letters and the logical axis names of parameters.

Arrays are channels-last; public signatures carry these letters in jaxtyping annotations:

    b  batch                 n  query tokens           h  attention heads (or latent height beside w)
    t  latent frames         m  key tokens             k  head dimension
    f  video frames          d  model width            c  channels
    h w  height, width       l  text tokens            s  denoising steps

Latents are `b t h w c`, tokens `b n d`, heads `b n h k`, videos `b f h w 3`.
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

LOGICAL_AXES = (LAYERS, EMBED, HEADS, MLP, INPUT, OUTPUT, VOCAB, NORM, KERNEL)
