"""Folders as diffusers and transformers write them themselves become bundles that compute the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.convert import contents, write
from lingbot_jax.convert.folders import NEGATIVE_PROMPT
from lingbot_jax.models import params
from lingbot_jax.models.config import DiTConfig, UMT5Config, VAEConfig
from lingbot_jax.models.dit import Condition
from lingbot_jax.parallel.mesh import MeshConfig, make_mesh
from lingbot_jax.worlds.config import BOUNDARY, SampleConfig
from lingbot_jax.worlds.open import open_world
from lingbot_jax.worlds.world import template
from tests.parity.peers import wan_transformer

pytestmark = pytest.mark.parity

B, T, H, W, Z = 1, 2, 4, 4, 4
DIT = DiTConfig(
    dim=64,
    layers=2,
    heads=4,
    ffn=128,
    freq_dim=32,
    text_dim=32,
    latent_channels=Z,
    control="none",
)
VAE = VAEConfig(width=8, channels=Z, mean=(0.1, -0.3, 0.2, 0.0), std=(1.5, 0.7, 1.0, 2.0))
TEXT = UMT5Config(vocab=64, dim=32, heads=4, head_dim=8, ffn=64, layers=2)
# Single letters, so that every text has tokens of its own.
VOCABULARY = [
    ("<pad>", 0.0),
    ("</s>", 0.0),
    ("<unk>", 0.0),
    *((c, -1.0) for c in "▁abcdefghijklmnopqrstuvwxyz"),
]


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """The PyTorch models, by the folder that they were saved into."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    made = {name: wan_transformer(DIT).eval() for name in ("transformer", "transformer_2")}
    moments = {"latents_mean": list(VAE.mean), "latents_std": list(VAE.std)}
    made["vae"] = diffusers.AutoencoderKLWan(base_dim=VAE.width, z_dim=Z, **moments).eval()
    sizes = {"d_model": TEXT.dim, "d_kv": TEXT.head_dim, "d_ff": TEXT.ffn, "vocab_size": TEXT.vocab}
    made["text_encoder"] = transformers.UMT5EncoderModel(
        transformers.UMT5Config(num_layers=TEXT.layers, num_heads=TEXT.heads, **sizes)
    ).eval()
    made["tokenizer"] = transformers.T5TokenizerFast(vocab=VOCABULARY, extra_ids=0)
    folder = tmp_path_factory.mktemp("diffusers")
    for name, model in made.items():
        sharded = {} if name == "tokenizer" else {"max_shard_size": "200KB"}
        model.save_pretrained(folder / name, **sharded)
    return folder, made


@pytest.fixture(scope="module")
def world(peers, tmp_path_factory):
    """Ours, through a bundle, computing in float32."""
    out = tmp_path_factory.mktemp("bundles") / "bundle"
    write.to_bundle(contents.look(str(peers[0])), out, "keep")
    opened = open_world(out, make_mesh(MeshConfig()))
    assert opened.config.networks == {"high": DIT, "low": DIT}
    assert (opened.config.codec, opened.config.text) == (VAE, TEXT)
    assert opened.config.boundary == BOUNDARY
    assert opened.config.sample == SampleConfig(negative_prompt=NEGATIVE_PROMPT)
    return opened


def in_float32(module):
    config = dataclasses.replace(module.config, dtype="float32")
    return params.with_arrays(template(config), params.arrays_of(module))


@pytest.mark.parametrize(("ours", "theirs"), [("high", "transformer"), ("low", "transformer_2")])
def test_transformers(peers, world, ours, theirs):
    import torch

    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    latents, mask, image = draw(B, T, H, W, Z), draw(B, T, H, W, 4), draw(B, T, H, W, Z)
    text, level = draw(B, DIT.text_len, DIT.text_dim), np.array([731.0], np.float32)
    given = torch.tensor(np.moveaxis(np.concatenate([latents, mask, image], -1), -1, 1))
    with torch.no_grad():
        out = peers[1][theirs](given, torch.tensor(level), torch.tensor(text), return_dict=False)[0]
    golden = np.moveaxis(out.numpy(), 1, -1)
    condition = Condition(jnp.asarray(text), None, jnp.asarray(mask), jnp.asarray(image))
    run = jax.jit(lambda model: model(jnp.asarray(latents), jnp.full((B, T), level[0]), condition))
    np.testing.assert_allclose(
        run(in_float32(world.networks[ours])), golden, atol=1e-4 * np.abs(golden).max()
    )


def test_text(peers, world):
    import torch

    texts = ["a narrow corridor", "snow"]
    given = peers[1]["tokenizer"](texts, padding="max_length", max_length=TEXT.length, return_tensors="pt")
    tokens = world.text.tokenize(texts)
    np.testing.assert_array_equal(tokens.values, given.input_ids.numpy())
    with torch.no_grad():
        golden = peers[1]["text_encoder"](**given).last_hidden_state.numpy()
    golden = np.where(np.asarray(tokens.mask)[..., None], golden, 0)
    encoder = dataclasses.replace(world.text, model=in_float32(world.text.model))
    np.testing.assert_allclose(encoder.encode(texts), golden, atol=1e-4 * np.abs(golden).max())


def test_codec(peers, world):
    import torch

    video = np.random.default_rng(0).uniform(-1, 1, (1, 5, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        raw = peers[1]["vae"].encode(torch.tensor(np.moveaxis(video, -1, 1))).latent_dist.mode().numpy()
    golden = (np.moveaxis(raw, 1, -1) - np.array(VAE.mean)) / np.array(VAE.std)
    latents = jax.jit(lambda codec, video: codec.encode(video))(world.codec, video)
    np.testing.assert_allclose(latents, golden, atol=1e-4 * np.abs(golden).max())


def test_back_through_published_names(peers, tmp_path):
    """diffusers -> published -> bundle: nothing is lost that the published layout has no file for."""
    first = contents.look(str(peers[0]))
    write.to_published(first, tmp_path / "published")
    again = contents.look(str(tmp_path / "published"))
    assert again.config == first.config
    for one, other in zip(first.parts, again.parts, strict=True):
        left, right = one.open(), other.open()
        for unit in one.units():
            np.testing.assert_array_equal(left(*unit), right(*unit), err_msg=f"{one.name} {unit}")
