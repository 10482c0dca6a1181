"""The umT5 encoder against transformers' UMT5EncoderModel, and `.pth` files against safetensors."""

import dataclasses

import jax
import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.convert import folders, names_text
from lingbot_jax.convert.read import TorchFile, fill
from lingbot_jax.models import params
from lingbot_jax.models.text import UMT5
from tests.convert import published

pytestmark = pytest.mark.parity


def test_umt5(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.UMT5Config(
        vocab_size=50, d_model=48, d_kv=12, d_ff=80, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu"
    )
    theirs = transformers.UMT5EncoderModel(config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(1 + 0.1 * torch.randn_like(p) if "layer_norm" in name else torch.randn_like(p) * 0.15)
    theirs.save_pretrained(tmp_path / "text_encoder")
    (network,) = folders.find(tmp_path).networks
    config = dataclasses.replace(network.config, dtype="float32")
    model = fill(params.abstract(lambda key: UMT5(config, key)), network.table, network.source)

    ids = torch.randint(0, 50, (3, 160))  # longer than the largest distance of the position buckets
    mask = torch.arange(160)[None] < torch.tensor([160, 37, 1])[:, None]
    with torch.no_grad():
        golden = theirs(input_ids=ids, attention_mask=mask.int()).last_hidden_state.numpy()
    out = np.asarray(jax.jit(UMT5.__call__)(model, ids.numpy(), mask.numpy()))
    valid = mask.numpy()
    np.testing.assert_allclose(out[valid], golden[valid], atol=1e-4)
    assert np.abs(golden).max() > 0.5


def test_pth_files_are_read_as_weights_only(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = published.random_tensors(published.Sizes().text, names_text.published(), 0, published.BF16)
    state = {k: torch.from_numpy(v.view(np.int16).copy()).view(torch.bfloat16) for k, v in tensors.items()}
    state["norm.weight"] = state["norm.weight"].float()
    torch.save(state, tmp_path / f"{folders.TEXT_FILE}.pth")
    (network,) = folders.find(tmp_path).networks
    assert isinstance(network.source, TorchFile)
    for name, tensor in tensors.items():
        read = network.source.read(name)
        assert read.dtype == (np.float32 if name == "norm.weight" else published.BF16)
        np.testing.assert_array_equal(read.astype(np.float32), tensor.astype(np.float32))

    torch.save({"weight": torch.nn.Linear(2, 2)}, tmp_path / "unsafe.pth")
    with pytest.raises(ConfigError, match="unsafe.pth: not a state dict that can be read as weights only"):
        TorchFile(tmp_path / "unsafe.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(ConfigError, match="holds something else than named tensors"):
        TorchFile(tmp_path / "list.pth")
