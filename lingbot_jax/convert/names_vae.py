"""Name tables of the Wan 2.1 VAE: the published file `Wan2.1_VAE.pth`, and diffusers' AutoencoderKLWan."""

from collections.abc import Iterator

from lingbot_jax.convert.names import CONV1X1, CONV2D, CONV3D, SCALE2D, SCALE3D, Entry
from lingbot_jax.models.config import VAEConfig

LINEAR3D = "o i 1 1 1 -> i o"  # a 1x1x1 convolution

# Names inside a residual block, an attention block and around them: (published, diffusers).
RESIDUAL = {
    "norm1": ("residual.0", "norm1"),
    "conv1": ("residual.2", "conv1"),
    "norm2": ("residual.3", "norm2"),
    "conv2": ("residual.6", "conv2"),
    "shortcut": ("shortcut", "conv_shortcut"),
}
ENDS = {
    "conv_in": ("conv1", "conv_in"),
    "norm_out": ("head.0", "norm_out"),
    "conv_out": ("head.2", "conv_out"),
}
MOMENTS = {"moments": ("conv1", "quant_conv"), "unmoments": ("conv2", "post_quant_conv")}


def _affine(ours: str, published: str, layout: str) -> Iterator[Entry]:
    yield Entry(f"{ours}.kernel", f"{published}.weight", layout)
    yield Entry(f"{ours}.bias", f"{published}.bias")


def _residual(ours: str, published: str, kind: int, shortcut: bool) -> Iterator[Entry]:
    for name, names in RESIDUAL.items():
        if name.startswith("norm"):
            yield Entry(f"{ours}.{name}.scale", f"{published}.{names[kind]}.gamma", SCALE3D)
        elif name != "shortcut" or shortcut:
            layout = LINEAR3D if name == "shortcut" else CONV3D
            yield from _affine(f"{ours}.{name}", f"{published}.{names[kind]}", layout)


def _resample(ours: str, published: str, time: bool) -> Iterator[Entry]:
    yield from _affine(f"{ours}.space", f"{published}.resample.1", CONV2D)
    if time:
        yield from _affine(f"{ours}.time", f"{published}.time_conv", CONV3D)


def _middle(ours: str, published: str, kind: int) -> Iterator[Entry]:
    before, attention, after = (
        ("middle.0", "middle.1", "middle.2"),
        ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    )[kind]
    yield from _residual(f"{ours}.middle.before", f"{published}.{before}", kind, shortcut=False)
    yield Entry(f"{ours}.middle.attention.norm.scale", f"{published}.{attention}.norm.gamma", SCALE2D)
    yield from _affine(f"{ours}.middle.attention.qkv", f"{published}.{attention}.to_qkv", CONV1X1)
    yield from _affine(f"{ours}.middle.attention.out", f"{published}.{attention}.proj", CONV1X1)
    yield from _residual(f"{ours}.middle.after", f"{published}.{after}", kind, shortcut=False)


def _encoder_layers(config: VAEConfig, kind: int) -> Iterator[Entry]:
    """Both publications number blocks and downsamplers in one list."""
    prefix = ("encoder.downsamples", "encoder.down_blocks")[kind]
    index, inputs = 0, 1
    for level, outputs in enumerate(config.mults):
        for _ in range(config.blocks):
            shortcut = inputs != outputs
            yield from _residual(f"encoder.layers.{index}", f"{prefix}.{index}", kind, shortcut)
            index, inputs = index + 1, outputs
        if level < len(config.mults) - 1:
            time = config.time_strides[level]
            yield from _resample(f"encoder.layers.{index}", f"{prefix}.{index}", time)
            index += 1


def _decoder_layers(config: VAEConfig, kind: int) -> Iterator[Entry]:
    """Diffusers groups the blocks of a level; the published file numbers everything in one list."""
    index, inputs = 0, config.mults[-1] * config.width
    for level, mult in enumerate(reversed(config.mults)):
        outputs, group = mult * config.width, f"decoder.up_blocks.{level}"
        for block in range(config.blocks + 1):
            name = (f"decoder.upsamples.{index}", f"{group}.resnets.{block}")[kind]
            yield from _residual(f"decoder.layers.{index}", name, kind, inputs != outputs)
            index, inputs = index + 1, outputs
        if level < len(config.mults) - 1:
            name = (f"decoder.upsamples.{index}", f"{group}.upsamplers.0")[kind]
            time = config.time_strides[::-1][level]
            yield from _resample(f"decoder.layers.{index}", name, time)
            index, inputs = index + 1, outputs // 2


def _table(config: VAEConfig, kind: int) -> list[Entry]:
    entries: list[Entry] = []
    for part, layers in (("encoder", _encoder_layers), ("decoder", _decoder_layers)):
        entries += _affine(f"{part}.conv_in", f"{part}.{ENDS['conv_in'][kind]}", CONV3D)
        entries += layers(config, kind)
        entries += _middle(part, part, kind)
        entries.append(Entry(f"{part}.norm_out.scale", f"{part}.{ENDS['norm_out'][kind]}.gamma", SCALE3D))
        entries += _affine(f"{part}.conv_out", f"{part}.{ENDS['conv_out'][kind]}", CONV3D)
    for ours, names in MOMENTS.items():
        entries += _affine(ours, names[kind], LINEAR3D)
    return entries


def published(config: VAEConfig) -> list[Entry]:
    """Names of `Wan2.1_VAE.pth`."""
    return _table(config, 0)


def diffusers(config: VAEConfig) -> list[Entry]:
    """Names of diffusers' `AutoencoderKLWan` folder."""
    return _table(config, 1)
