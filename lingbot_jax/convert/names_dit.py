"""Names of one WorldDiT: the published LingBot-World / Wan checkpoint, and diffusers' WanTransformer3DModel.

One table; each row is a parameter of ours, its name in the published checkpoint, its name in diffusers (None:
diffusers has no such layer), and a layout. Linear layers and norms are one row for all their tensors.
"""

import dataclasses
from collections.abc import Iterator

from lingbot_jax.convert.names import AS_IS, LEADING_ONE, LINEAR, Entry
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.lora import LoraConfig

PATCH = "o c 1 r s -> (r s) c o"  # a 3D convolution whose time patch is 1
CONTROL_PATCH = "o (c r s) -> (r s) c o"
# Self-attention q and k: rotary pairs from neighbours to halves, see models/rope.py.
ROTARY_KERNEL = "(h k two) i -> i (h two k)"
ROTARY_VECTOR = "(h k two) -> (h two k)"
LORA_PREFIX = "transformer."  # of the pipeline's component


@dataclasses.dataclass(frozen=True)
class _Row:
    """`kind` says which tensors there are: linear (kernel, bias), norm (scale, bias), scale, or one tensor."""

    kind: str
    ours: str
    published: str
    diffusers: str | None
    layout: str = LINEAR


def _attention(ours: str, published: str, diffusers: str, layout: str) -> Iterator[_Row]:
    """The rows of one attention; `layout` is the one of q and k."""
    scale = ROTARY_VECTOR if layout == ROTARY_KERNEL else AS_IS
    for name, kernel in (("q", layout), ("k", layout), ("v", LINEAR)):
        yield _Row("linear", f"{ours}.{name}", f"{published}.{name}", f"{diffusers}.to_{name}", kernel)
    yield _Row("linear", f"{ours}.o", f"{published}.o", f"{diffusers}.to_out.0")
    for name in ("norm_q", "norm_k"):
        yield _Row("scale", f"{ours}.{name}", f"{published}.{name}", f"{diffusers}.{name}", scale)


def _rows(config: DiTConfig) -> Iterator[_Row]:
    embedder = "condition_embedder"
    yield _Row("linear", "patch", "patch_embedding", "patch_embedding", PATCH)
    yield _Row("linear", "text.up", "text_embedding.0", f"{embedder}.text_embedder.linear_1")
    yield _Row("linear", "text.down", "text_embedding.2", f"{embedder}.text_embedder.linear_2")
    yield _Row("linear", "time.mlp.up", "time_embedding.0", f"{embedder}.time_embedder.linear_1")
    yield _Row("linear", "time.mlp.down", "time_embedding.2", f"{embedder}.time_embedder.linear_2")
    yield _Row("linear", "time.projection", "time_projection.1", f"{embedder}.time_proj")
    yield _Row("tensor", "head.modulation", "head.modulation", "scale_shift_table", LEADING_ONE)
    yield _Row("linear", "head.projection", "head.head", "proj_out")

    block = "blocks.{n}"
    yield _Row(
        "tensor", "blocks.modulation", f"{block}.modulation", f"{block}.scale_shift_table", LEADING_ONE
    )
    yield from _attention("blocks.self_attention", f"{block}.self_attn", f"{block}.attn1", ROTARY_KERNEL)
    yield _Row("norm", "blocks.cross_norm", f"{block}.norm3", f"{block}.norm2")
    yield from _attention("blocks.cross_attention", f"{block}.cross_attn", f"{block}.attn2", LINEAR)
    yield _Row("linear", "blocks.ffn.up", f"{block}.ffn.0", f"{block}.ffn.net.0.proj")
    yield _Row("linear", "blocks.ffn.down", f"{block}.ffn.2", f"{block}.ffn.net.2")

    if config.control != "none":
        yield _Row("linear", "control.patch", "patch_embedding_wancamctrl", None, CONTROL_PATCH)
        yield _Row("linear", "control.mlp.up", "c2ws_hidden_states_layer1", None)
        yield _Row("linear", "control.mlp.down", "c2ws_hidden_states_layer2", None)
        yield _Row("linear", "blocks.control.mlp.up", f"{block}.cam_injector_layer1", None)
        yield _Row("linear", "blocks.control.mlp.down", f"{block}.cam_injector_layer2", None)
        yield _Row("linear", "blocks.control.scale", f"{block}.cam_scale_layer", None)
        yield _Row("linear", "blocks.control.shift", f"{block}.cam_shift_layer", None)


def _sizes(layout: str, config: DiTConfig) -> tuple[tuple[str, int], ...]:
    """Lengths of the axes that a layout joins."""
    _, rows, columns = config.patch
    taps, pairs = (("r", rows), ("s", columns)), (("k", config.head_dim // 2), ("two", 2))
    known = {PATCH: taps, CONTROL_PATCH: taps, ROTARY_KERNEL: pairs, ROTARY_VECTOR: pairs}
    return known.get(layout, ())


def _entries(row: _Row, name: str, config: DiTConfig) -> Iterator[Entry]:
    """The tensors of a row under the given foreign name."""
    bias = ROTARY_VECTOR if row.layout == ROTARY_KERNEL else AS_IS
    layouts = {
        "linear": (("kernel", "weight", row.layout), ("bias", "bias", bias)),
        "norm": (("scale", "weight", AS_IS), ("bias", "bias", AS_IS)),
        "scale": (("scale", "weight", row.layout),),
        "tensor": ((None, None, row.layout),),
    }
    for ours, theirs, layout in layouts[row.kind]:
        yield Entry(
            f"{row.ours}.{ours}" if ours else row.ours,
            f"{name}.{theirs}" if theirs else name,
            layout,
            _sizes(layout, config),
        )


def dit_table(config: DiTConfig) -> list[Entry]:
    """Published LingBot-World and Wan names."""
    return [entry for row in _rows(config) for entry in _entries(row, row.published, config)]


def diffusers_dit_table(config: DiTConfig) -> list[Entry]:
    """Names of diffusers' WanTransformer3DModel.

    Raises:
      ValueError: the model has control layers, which diffusers has no names for.
    """
    missing = [row.ours for row in _rows(config) if row.diffusers is None]
    if missing:
        raise ValueError(f"WanTransformer3DModel has no control layers: {', '.join(missing)}")
    return [entry for row in _rows(config) for entry in _entries(row, row.diffusers, config)]


def lora_table(config: DiTConfig, lora: LoraConfig) -> list[Entry]:
    """Names of A and B where diffusers loads them into a WanTransformer3DModel, which are PEFT's."""
    adapted = [row for row in _rows(config) if f"{row.ours}.kernel" in lora.kernels()]
    return [
        Entry(
            f"{row.ours}.lora.{ours}_kernel",
            f"{LORA_PREFIX}{row.diffusers}.lora_{theirs}.weight",
            layout,
            sizes,
        )
        for row in adapted
        for ours, theirs, layout, sizes in (
            ("a", "A", LINEAR, ()),
            ("b", "B", row.layout, _sizes(row.layout, config)),
        )
    ]
