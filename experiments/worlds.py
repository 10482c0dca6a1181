"""Opens a world for generation: a run directory of experiments.train, or a bundle of experiments.convert."""

import dataclasses
import pathlib

import jax

from experiments.codecs import open_codec
from lingbot_jax.config import ConfigError
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.diffusion.guidance import Guidance
from lingbot_jax.models import params
from lingbot_jax.models.codec import Codec
from lingbot_jax.models.dit import WorldDiT
from lingbot_jax.models.experts import NoiseExperts
from lingbot_jax.models.text import UMT5, TextEncoder, UMT5Encoder, load_tokenizer
from lingbot_jax.models.vae import WanVAE
from lingbot_jax.rollout.bidirectional import SampleConfig
from lingbot_jax.rollout.causal import CausalConfig
from lingbot_jax.serve import bundle
from lingbot_jax.training.checkpoints import load_config, load_ema
from lingbot_jax.training.config import PoseConfig
from lingbot_jax.training.state import abstract_model, merge


@dataclasses.dataclass(frozen=True)
class World:
    """Everything that generates.

    Attributes:
      model: one network, or two experts. codec, text_encoder: what it was trained with.
      pose: how its control sees camera poses. sample, causal: how it is sampled unless the user says
        otherwise; None: not a world of that kind.
    """

    model: WorldDiT | NoiseExperts
    codec: Codec
    text_encoder: TextEncoder
    pose: PoseConfig
    sample: SampleConfig | None
    causal: CausalConfig | None

    @property
    def config(self) -> DiTConfig:
        return self.model.config


def open_world(folder: str) -> World:
    """Opens a run directory or a bundle, whichever it is. Raises ConfigError."""
    if (pathlib.Path(folder) / bundle.MANIFEST).is_file():
        return _open_bundle(pathlib.Path(folder))
    return _open_run(folder)


def _open_run(run: str) -> World:
    """The averaged model of a run, sampled with the shift it was trained with, without guidance."""
    config = load_config(run)
    model = merge(abstract_model(config), load_ema(run))
    codec, text_encoder = open_codec(config)
    sample = SampleConfig(steps=20, shift=config.flow.shift, guidance=Guidance(1.0, 1.0))
    causal = CausalConfig(shift=config.flow.shift)
    return World(model, codec, text_encoder, config.pose, sample, causal)


def _open_bundle(folder: pathlib.Path) -> World:
    """A converted checkpoint, in the dtypes it is stored in."""
    manifest = bundle.read_manifest(folder)
    for name, part in (("world", manifest.world), ("vae", manifest.vae), ("text", manifest.text)):
        if not part:
            raise ConfigError(
                f"run = {str(folder)!r}: the bundle has no {name}; convert the whole checkpoint"
            )

    def network(name: str, make):
        return bundle.restore(bundle.params_folder(folder, name), params.abstract(make))

    experts = {n: network(n, lambda key, c=c: WorldDiT(c, key)) for n, c in manifest.world.items()}
    if set(experts) == {"high", "low"}:
        config = manifest.world["high"]
        model = jax.eval_shape(lambda: NoiseExperts(config, jax.random.key(0)))
        model = model.replace("high", experts["high"]).replace("low", experts["low"])
    else:
        (model,) = experts.values()
    codec = network("vae", lambda key: WanVAE(manifest.vae, key))
    tokenizer = load_tokenizer(folder / bundle.TOKENIZER, manifest.text.length)
    text_encoder = UMT5Encoder(network("text", lambda key: UMT5(manifest.text, key)), tokenizer)
    return World(model, codec, text_encoder, PoseConfig(), manifest.sample, manifest.causal)
