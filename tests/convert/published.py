"""A narrow checkpoint folder in the published layout, with random numbers: two experts in shards, Wan VAE, umT5 with a
real tokenizer file. Deterministic from a seed; no PyTorch.

Sizes divide by 2 along each mesh axis (data, fsdp, seq) unless others are given.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import save_file

from lingbot_jax.convert import names_dit, names_text, names_vae
from lingbot_jax.convert.names import Entry, expand
from lingbot_jax.models import params
from lingbot_jax.models.config import DiTConfig, UMT5Config, VAEConfig
from lingbot_jax.worlds.world import template

BF16 = ml_dtypes.bfloat16
VAE_FILE, TEXT_FILE = "Wan2.1_VAE", "models_t5_umt5-xxl-enc-bf16"
TOKENIZER_FILE = "google/umt5-xxl/tokenizer.json"
_TEXT = (
    "a narrow corridor door snow an the of in on and with long dark bright corridors doors room rooms "
    "forest game first person view walks walk stone brick walls floor light lamp"
)

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of `write_published`. `experts`: folder names; `control`: of their config.json, None: it does not say."""

    dim: int = 64
    heads: int = 4
    layers: int = 2
    ffn: int = 128
    freq_dim: int = 32
    text_dim: int = 32
    text_len: int = 16
    control: str | None = "cam"
    vae_width: int = 8
    vae_channels: int = 4
    text_heads: int = 4
    text_layers: int = 2
    text_ffn: int = 64
    experts: tuple[str, ...] = ("high_noise_model", "low_noise_model")
    shards: int = 3

    @property
    def dit(self) -> DiTConfig:
        return DiTConfig(
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            ffn=self.ffn,
            freq_dim=self.freq_dim,
            text_dim=self.text_dim,
            text_len=self.text_len,
            latent_channels=self.vae_channels,
            control=self.control or "cam",
        )

    @property
    def vae(self) -> VAEConfig:
        z = self.vae_channels
        moments = {} if z == 16 else {"mean": (0.0,) * z, "std": (1.0,) * z}
        return VAEConfig(width=self.vae_width, mults=(1, 1, 2, 2), blocks=1, channels=z, **moments)

    @property
    def text(self) -> UMT5Config:
        return UMT5Config(
            vocab=64,
            dim=self.text_dim,
            heads=self.text_heads,
            head_dim=self.text_dim // self.text_heads,
            ffn=self.text_ffn,
            layers=self.text_layers,
            length=self.text_len,
        )


def write_published(folder: pathlib.Path, seed: int = 0, **sizes: Any) -> dict[str, Tensors]:
    """Writes the folder, which may exist. Returns its tensors by file or folder of a network.

    Args:
      sizes: fields of `Sizes`.
    """
    made, written = Sizes(**sizes), {}
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(made.experts):
        written[name] = random_tensors(made.dit, names_dit.dit_table(made.dit), [seed, number], BF16)
        (folder / name).mkdir()
        write_json(folder / name / "config.json", dit_json(made.dit, control_type=made.control))
        write_sharded(folder / name, written[name], made.shards)
    written[VAE_FILE] = random_tensors(made.vae, names_vae.published(made.vae), [seed, 10], np.float32)
    written[TEXT_FILE] = random_tensors(made.text, names_text.published(), [seed, 11], BF16)
    for stem in (VAE_FILE, TEXT_FILE):
        save_file(written[stem], folder / f"{stem}.safetensors", metadata={"format": "pt"})
    (folder / TOKENIZER_FILE).parent.mkdir(parents=True)
    tokenizer().save(str(folder / TOKENIZER_FILE))
    return written


def dit_json(config: DiTConfig, **changes: Any) -> dict[str, Any]:
    """config.json as the published class writes it; a change to None leaves the key out."""
    values = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "dim": config.dim,
        "eps": config.eps,
        "ffn_dim": config.ffn,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "model_type": "i2v" if config.image_condition else "t2v",
        "num_heads": config.heads,
        "num_layers": config.layers,
        "out_dim": config.latent_channels,
        "text_dim": config.text_dim,
        "text_len": config.text_len,
        "control_type": config.control,
    }
    return {key: value for key, value in (values | changes).items() if value is not None}


def random_tensors(config: Any, table: list[Entry], seed: int | Sequence[int], dtype: Any) -> Tensors:
    """Random tensors under the table's published names: near 1 where the module starts at 1, small elsewhere, so that
    what flows through the network stays of order 1."""
    rng = np.random.default_rng(seed)
    shapes = {path: tuple(leaf.shape) for path, leaf in params.arrays_of(template(config)).items()}
    made = {}
    for name, slot in expand(table, shapes).items():
        fan_in = int(np.prod(slot.shape[1:])) or 1
        value = rng.standard_normal(slot.shape, np.float32) / np.sqrt(fan_in if len(slot.shape) > 1 else 100)
        made[name] = (value + slot.entry.ours.endswith("scale")).astype(dtype)
    return made


def write_sharded(folder: pathlib.Path, tensors: Mapping[str, np.ndarray], shards: int) -> None:
    """Shards and their index, tensors dealt out in turn so that a stacked parameter spans shards."""
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"diffusion_pytorch_model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)


def write_json(path: pathlib.Path, values: Any) -> None:
    path.write_text(json.dumps(values))


def tokenizer() -> tokenizers.Tokenizer:
    """A word tokenizer with the special tokens of umT5: pad 0, end 1, unknown 2, end appended."""
    words = ["<pad>", "</s>", "<unk>", *_TEXT.split()]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return made
