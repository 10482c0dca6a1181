"""Low-rank adapters of a run, as diffusers loads them: its transformer then computes what our merged one does."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.convert import contents
from lingbot_jax.convert.lora import to_lora
from lingbot_jax.models import params
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.dit import Condition
from lingbot_jax.models.lora import LoraConfig, is_lora
from lingbot_jax.worlds.checkpoints import Checkpoints
from lingbot_jax.worlds.open import find
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
    dtype="float32",
)
LORA = LoraConfig(rank=3, alpha=6.0)


@pytest.fixture(scope="module")
def peer():
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    torch.manual_seed(0)
    return wan_transformer(DIT).eval()


@pytest.fixture(scope="module")
def run(peer, tmp_path_factory):
    """A run whose frozen parameters are the peer's, with adapters that have learnt something."""
    folder = tmp_path_factory.mktemp("lora")
    peer.save_pretrained(folder / "peer" / "transformer")
    (part,) = contents.look(str(folder / "peer")).parts
    read, arrays = part.open(), {}
    for path, spec in part.specs.items():
        layers = [layer for own, layer in part.units() if own == path]
        arrays[path] = np.stack([read(path, i) for i in layers]) if layers != [None] else read(path, None)
        assert arrays[path].shape == spec.shape
    rng = np.random.default_rng(0)
    shapes = params.arrays_of(template(DIT, LORA))
    low = {p: np.float32(rng.normal(0, 0.2, leaf.shape)) for p, leaf in shapes.items() if is_lora(p)}
    tree = {"params": {"world": jax.tree.map(jnp.asarray, arrays | low)}}
    described = {"world": {"networks": {"world": dataclasses.asdict(DIT)}}, "codec": "codec"}
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(json.dumps(described | {"lora": dataclasses.asdict(LORA)}))
    with Checkpoints(folder / "run") as checkpoints:
        checkpoints.save(1, tree)
    return folder / "run"


def test_diffusers_loads_the_adapters(peer, run, tmp_path):
    import torch
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    latents, mask, image = draw(B, T, H, W, Z), draw(B, T, H, W, 4), draw(B, T, H, W, Z)
    text, level = draw(B, DIT.text_len, DIT.text_dim), np.array([731.0], np.float32)
    given = torch.tensor(np.moveaxis(np.concatenate([latents, mask, image], -1), -1, 1))

    def theirs() -> np.ndarray:
        with torch.no_grad():
            out = peer(given, torch.tensor(level), torch.tensor(text), return_dict=False)[0]
        return np.moveaxis(out.numpy(), 1, -1)

    before = theirs()
    to_lora(run, tmp_path / "out")
    mixin = WanLoraLoaderMixin  # of the pipelines; it calls the transformer's own load_lora_adapter
    mixin.load_lora_into_transformer(
        mixin.lora_state_dict(tmp_path / "out", weight_name="world.safetensors"), peer
    )
    golden = theirs()
    assert np.abs(golden - before).max() > 0.1 * np.abs(golden).max()
    arrays = find(run).read("world", params.arrays_of(template(DIT)))
    condition = Condition(jnp.asarray(text), None, jnp.asarray(mask), jnp.asarray(image))
    model = params.with_arrays(template(DIT), arrays)
    ours = jax.jit(lambda m: m(jnp.asarray(latents), jnp.full((B, T), level[0]), condition))(model)
    np.testing.assert_allclose(ours, golden, atol=1e-4 * np.abs(golden).max())
