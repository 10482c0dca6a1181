"""Opens what turns recordings into what a model sees: its codec and its text encoder."""

import pathlib

from lingbot_jax.config import ConfigError
from lingbot_jax.models import params
from lingbot_jax.models.codec import Codec, load_linear
from lingbot_jax.models.text import UMT5, HashedNgramEncoder, TextEncoder, UMT5Encoder, load_tokenizer
from lingbot_jax.models.vae import WanVAE
from lingbot_jax.serve import bundle
from lingbot_jax.training.config import TrainConfig


def open_codec(config: TrainConfig) -> tuple[Codec, TextEncoder]:
    """Those of a run: of the bundle that `config.codec` names, or the linear codec and n-grams.

    Raises:
      ConfigError: neither is there, or the text encoder does not fit the model.
    """
    folder, model = pathlib.Path(config.codec), config.model
    if not (folder / bundle.MANIFEST).is_file():
        return load_linear(config.codec), HashedNgramEncoder(model.text_dim, model.text_len)
    manifest = bundle.read_manifest(folder)
    vae, text = manifest.vae, manifest.text
    for name, part in (("vae", vae), ("text", text)):
        if part is None:
            raise ConfigError(
                f"codec = {config.codec!r}: the bundle has no {name}; convert the whole checkpoint"
            )
    if (text.dim, text.length) != (model.text_dim, model.text_len):
        raise ConfigError(
            f"model.text_dim, model.text_len = {(model.text_dim, model.text_len)}: the text encoder of "
            f"{config.codec} gives {(text.dim, text.length)}"
        )
    template = params.abstract(lambda key: WanVAE(vae, key))
    codec = bundle.restore(bundle.params_folder(folder, "vae"), template)
    template = params.abstract(lambda key: UMT5(text, key))
    encoder = bundle.restore(bundle.params_folder(folder, "text"), template)
    return codec, UMT5Encoder(encoder, load_tokenizer(folder / bundle.TOKENIZER, text.length))
