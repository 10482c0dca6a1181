"""Tiny checkpoint folders in the published layout, with random numbers."""

import json
import pathlib

import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import save_file

from lingbot_jax.convert import names_dit, names_text, names_vae
from lingbot_jax.convert.folders import TEXT_FILE, TOKENIZER_FILES, VAE_FILE, parameter_shapes
from lingbot_jax.convert.names import Entry, expand
from lingbot_jax.models.config import DiTConfig, UMT5Config, VAEConfig

DIT = DiTConfig(
    dim=24, layers=3, heads=2, ffn=40, freq_dim=8, text_dim=16, text_len=6, control="cam", dtype="bfloat16"
)
VAE = VAEConfig(width=4, channels=16)
TEXT = UMT5Config(vocab=31, dim=16, heads=2, head_dim=8, ffn=24, layers=2, length=6)
BF16 = ml_dtypes.bfloat16


def dit_json(config: DiTConfig, **changes) -> dict:
    """config.json as the published class writes it."""
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


def random_tensors(config, table: list[Entry], seed: int, dtype) -> dict[str, np.ndarray]:
    """Random tensors under the table's published names."""
    rng = np.random.default_rng(seed)
    slots = expand(table, parameter_shapes(config))
    return {name: rng.standard_normal(slot.shape).astype(dtype) for name, slot in slots.items()}


def write_sharded(folder: pathlib.Path, tensors: dict[str, np.ndarray], shards: int) -> None:
    """Shards and their index, tensors dealt out in turn so that a stacked parameter spans shards."""
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"diffusion_pytorch_model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def tokenizer() -> tokenizers.Tokenizer:
    """A word tokenizer with the special tokens of umT5: pad 0, end 1, unknown 2, end appended."""
    words = ["<pad>", "</s>", "<unk>", "a", "narrow", "corridor", "door", "snow"]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return made


def write_published(folder: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
    """Two experts in shards, VAE, text encoder, tokenizer. Returns the tensors by file or folder."""
    written = {}
    for seed, name in enumerate(("high_noise_model", "low_noise_model")):
        place = folder / name
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(dit_json(DIT)))
        written[name] = random_tensors(DIT, names_dit.dit_table(DIT), seed, BF16)
        write_sharded(place, written[name], shards=3)
    written[VAE_FILE] = random_tensors(VAE, names_vae.published(VAE), 2, np.float32)
    written[TEXT_FILE] = random_tensors(TEXT, names_text.published(), 3, BF16)
    for stem in (VAE_FILE, TEXT_FILE):
        save_file(written[stem], folder / f"{stem}.safetensors")
    (folder / TOKENIZER_FILES[0]).parent.mkdir(parents=True)
    tokenizer().save(str(folder / TOKENIZER_FILES[0]))
    return written
