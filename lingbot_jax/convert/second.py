"""Transformers of LingBot-World 2.0 without a config.json of WanModel: what it would say, and how they are sampled."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lingbot_jax.config import ConfigError
from lingbot_jax.convert.configs import Fields, tensor_size
from lingbot_jax.convert.read import Source
from lingbot_jax.worlds.config import CausalConfig

PATCH = "patch_embedding.weight"
HEAD_DIM = 128  # of every published transformer
ROLLOUT = {
    "chunk": "num_frames_per_block",
    "window": "sliding_window_num_frames",
    "sink": "sink_size",
    "shift": "flow_shift",
}


def wan_json(source: Source, heads: int | None) -> dict[str, Any]:
    """What the config.json of a WanModel would say, from the shapes of its tensors.

    Args:
      heads: attention heads, which no shape tells; None: as many as give heads of 128.

    Raises:
      ConfigError: tensors of another network, or a width that is no multiple of 128 and no heads given.
    """
    size = lambda name, axis: tensor_size(source, name, axis)
    dim, patch = size(PATCH, 0), [size(PATCH, axis) for axis in (2, 3, 4)]
    if heads is None and dim % HEAD_DIM:
        raise ConfigError(
            f"{source.name}: no config.json, and width {dim} is not made of heads of {HEAD_DIM}; give --heads"
        )
    numbers = [re.match(r"blocks\.(\d{1,6})\.", name) for name in source.tensors]
    inputs, outputs = size(PATCH, 1), size("head.head.weight", 0) // math.prod(patch)
    return {
        "model_type": "t2v" if inputs == outputs else "i2v",
        "dim": dim,
        "num_heads": heads or dim // HEAD_DIM,
        "num_layers": 1 + max((int(match[1]) for match in numbers if match), default=0),
        "ffn_dim": size("blocks.0.ffn.0.weight", 0),
        "freq_dim": size("time_embedding.0.weight", 1),
        "text_dim": size("text_embedding.0.weight", 1),
        "in_dim": inputs,
        "out_dim": outputs,
        "patch_size": patch,
    }


def diffusers_config(
    values: Mapping[str, Any], place: Path, source: Source
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A diffusers copy of the second generation: the config.json of its class as WanModel's, and how it is sampled."""
    fields = Fields(values, place)
    heads = fields.whole("num_attention_heads")
    made = wan_json(source, heads)
    for theirs, own in (
        ("attention_head_dim", made["dim"] // heads),
        ("num_layers", made["num_layers"]),
        ("ffn_dim", made["ffn_dim"]),
    ):
        fields.fixed(theirs, own)
    rollout = fields.named(ROLLOUT)
    fields.done()
    if isinstance(rollout.get("shift"), int):
        rollout["shift"] = float(rollout["shift"])
    causal = fields.build(
        CausalConfig, rollout | {"schedule": "warped", "levels": (1000, 750, 500, 250)}, ROLLOUT
    )
    return made, {"sample": None, "causal": causal}
