"""What a source holds, as a text of a few lines."""

import numpy as np

from lingbot_jax.convert.contents import Contents, Part
from lingbot_jax.convert.write import StoredDtype, cast, nbytes
from lingbot_jax.models.config import (
    CodecConfig,
    ConvCodecConfig,
    DiTConfig,
    NgramConfig,
    UMT5Config,
    VAEConfig,
)
from lingbot_jax.worlds.config import WorldConfig
from lingbot_jax.worlds.quantization import SCALE


def describe(contents: Contents, dtype: StoredDtype = "keep") -> list[str]:
    """The kind of a source, its parts with sizes and what they would be written as, sampling, and what is missing.

    Args:
      dtype: that it would be written in.
    """
    lines = [f"{contents.path}: {contents.kind}"]
    for part in contents.parts:
        lines.append(f"{part.name}: {sizes(part.config)}; {_arrays(part, dtype)}")
    if isinstance(contents.config.text, NgramConfig):
        lines.append(f"text: {sizes(contents.config.text)}")
    lines += sampling(contents.config)
    parts = [cast(part, dtype) for part in contents.parts]
    total = amount(sum(map(parameters, parts)))
    lines.append(f"total: {total} parameters, {amount(sum(nbytes(p.specs) for p in parts), 'B')} to write")
    return lines + list(contents.notes)


def parameters(part: Part) -> int:
    return sum(int(np.prod(s.shape)) for path, s in part.specs.items() if not path.endswith(SCALE))


def amount(number: int, unit: str = "") -> str:
    """`18.54B`, `126.89M`, `3.07K`, `12`; of bytes `37.09 GB`."""
    names = [" GB", " MB", " kB"] if unit else ["B", "M", "K"]
    for size, name in zip((1e9, 1e6, 1e3), names, strict=True):
        if number >= size:
            return f"{number / size:.2f}{name}"
    return f"{number} {unit}".strip()


def _arrays(part: Part, dtype: StoredDtype) -> str:
    if part.wrong:
        return f"{part.tensors} tensors, of which {len(part.wrong)} do not fit"
    kinds = lambda specs: "+".join(sorted({str(spec.dtype) for spec in specs.values()}))
    shown = lambda specs: f"{kinds(specs)} {amount(nbytes(specs), 'B')}"
    written = shown(cast(part, dtype).specs)
    source = shown(part.specs)
    stored = source if source == written else f"{source} -> {written}"
    return f"{amount(parameters(part))} parameters in {part.tensors} tensors, {stored}"


def sizes(config: DiTConfig | CodecConfig | NgramConfig | UMT5Config) -> str:
    """The sizes of a network in one line."""
    if isinstance(config, DiTConfig):
        kind = "image to video" if config.image_condition else "text to video"
        return (
            f"dim {config.dim}, layers {config.layers}, heads {config.heads}, ffn {config.ffn}, {kind}, control "
            f"{config.control}"
        )
    if isinstance(config, NgramConfig):
        return f"hashed n-grams, dim {config.dim}, length {config.length}, without parameters"
    if isinstance(config, UMT5Config):
        return (
            f"umT5, dim {config.dim}, layers {config.layers}, heads {config.heads}, vocabulary {config.vocab}, length "
            f"{config.length}"
        )
    names = {VAEConfig: "Wan VAE, width {0.width}", ConvCodecConfig: "convolutional codec, width {0.width}"}
    kind = names.get(type(config), "linear codec").format(config)
    return f"{kind}, {config.channels} channels, stride {' x '.join(map(str, config.stride))}"


def sampling(config: WorldConfig) -> list[str]:
    lines = []
    if config.sample is not None:
        sample, guidance = config.sample, config.sample.guidance
        lines.append(
            f"sampling: {sample.steps} steps of {sample.solver}, shift {sample.shift:g}, guidance "
            f"{guidance.low:g} (low) {guidance.high:g} (high), "
            f"negative prompt of {len(sample.negative_prompt)} characters"
        )
    if config.causal is not None:
        causal = config.causal
        lines.append(
            f"chunks: {causal.chunk} latent frames in {len(causal.levels)} steps, window {causal.window}, sink "
            f"{causal.sink}, shift {causal.shift:g}"
        )
    if len(config.networks) == 2:
        lines.append(f"boundary: the expert high from noise level {config.boundary:g} on")
    return lines
