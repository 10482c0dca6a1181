"""The Wan VAE against diffusers' AutoencoderKLWan, with weights read from the folder diffusers saves."""

import jax
import numpy as np
import pytest

from lingbot_jax.convert import folders
from lingbot_jax.convert.read import fill
from lingbot_jax.models import params
from lingbot_jax.models.vae import WanVAE

pytestmark = pytest.mark.parity

SIZES = {
    "base_dim": 12,
    "z_dim": 4,
    "latents_mean": [0.1, -0.3, 0.2, 0.0],
    "latents_std": [1.5, 0.7, 1.0, 2.0],
}


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """The PyTorch model with random weights, and ours converted from its folder."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLWan(**SIZES).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():  # what initialisation leaves at 0 or 1 would hide mistakes
            if name.endswith(("gamma", "bias")):
                p.add_(0.1 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("diffusers")
    theirs.save_pretrained(folder / "vae")
    (network,) = folders.find(folder).networks
    template = params.abstract(lambda key: WanVAE(network.config, key))
    return torch, theirs, fill(template, network.table, network.source)


def channels_last(tensor) -> np.ndarray:
    return np.moveaxis(tensor.numpy(), 1, -1)


def test_encode(peers):
    torch, theirs, ours = peers
    video = torch.tanh(torch.randn(1, 3, 9, 32, 40))
    with torch.no_grad():
        mean = channels_last(theirs.encode(video).latent_dist.mean)
    golden = (mean - np.float32(SIZES["latents_mean"])) / np.float32(SIZES["latents_std"])
    latents = jax.jit(WanVAE.encode)(ours, channels_last(video))
    np.testing.assert_allclose(latents, golden, atol=1e-4)
    assert np.abs(golden).max() > 0.05


def test_decode(peers):
    torch, theirs, ours = peers
    latents = torch.randn(1, 4, 3, 4, 5)
    raw = latents * torch.tensor(SIZES["latents_std"]).view(-1, 1, 1, 1)
    raw = raw + torch.tensor(SIZES["latents_mean"]).view(-1, 1, 1, 1)
    with torch.no_grad():
        golden = channels_last(theirs.decode(raw).sample)
    video = jax.jit(WanVAE.decode)(ours, channels_last(latents))
    assert video.shape == golden.shape == (1, 9, 32, 40, 3)
    np.testing.assert_allclose(video, golden, atol=1e-4)
    assert 0.05 < np.abs(golden).mean() < 0.95  # not all clipped
