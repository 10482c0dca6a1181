"""Name tables of the umT5 encoder: the published `models_t5_umt5-xxl-enc-bf16.pth`, and transformers' folder."""

import dataclasses

from lingbot_jax.convert.names import AS_IS, LINEAR, Entry

TIED = "encoder.embed_tokens.weight"  # the same array as shared.weight

# Ours, published, transformers, layout.
ROWS = (
    ("embedding", "token_embedding.weight", "shared.weight", AS_IS),
    ("norm.scale", "norm.weight", "encoder.final_layer_norm.weight", AS_IS),
)
BLOCK = (
    ("norm1.scale", "norm1.weight", "layer.0.layer_norm.weight", AS_IS),
    ("q", "attn.q.weight", "layer.0.SelfAttention.q.weight", LINEAR),
    ("k", "attn.k.weight", "layer.0.SelfAttention.k.weight", LINEAR),
    ("v", "attn.v.weight", "layer.0.SelfAttention.v.weight", LINEAR),
    ("o", "attn.o.weight", "layer.0.SelfAttention.o.weight", LINEAR),
    (
        "bias",
        "pos_embedding.embedding.weight",
        "layer.0.SelfAttention.relative_attention_bias.weight",
        AS_IS,
    ),
    ("norm2.scale", "norm2.weight", "layer.1.layer_norm.weight", AS_IS),
    ("gate", "ffn.gate.0.weight", "layer.1.DenseReluDense.wi_0.weight", LINEAR),
    ("up", "ffn.fc1.weight", "layer.1.DenseReluDense.wi_1.weight", LINEAR),
    ("down", "ffn.fc2.weight", "layer.1.DenseReluDense.wo.weight", LINEAR),
)


def _table(prefix: str, kind: int) -> list[Entry]:
    entries = [Entry(row[0], row[kind], row[3]) for row in ROWS]
    return entries + [Entry(f"blocks.{row[0]}", f"{prefix}.{{n}}.{row[kind]}", row[3]) for row in BLOCK]


def published() -> list[Entry]:
    """Names of the published file."""
    return _table("blocks", 1)


def transformers(tied: bool = False) -> list[Entry]:
    """Names of transformers' `UMT5EncoderModel`, which ties two embeddings; `tied`: only the second was saved."""
    table = _table("encoder.block", 2)
    return [dataclasses.replace(e, published=TIED) if tied and e.ours == "embedding" else e for e in table]
