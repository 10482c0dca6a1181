"""WorldDiT against diffusers' WanTransformer3DModel: tiny random weights, forward and gradients in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.convert.names import expand
from lingbot_jax.convert.names_dit import diffusers_dit_table
from lingbot_jax.convert.read import Arrays, fill
from lingbot_jax.models import params
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.dit import Condition, WorldDiT
from tests.parity.peers import wan_transformer

CONFIG = DiTConfig(
    dim=72,
    layers=3,
    heads=3,
    ffn=100,
    freq_dim=32,
    text_dim=20,
    text_len=9,
    control="none",
    dtype="float32",
)
B, T, H, W = 2, 3, 6, 8

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def peers():
    """The same weights in both: (torch model, ours, slots by torch name)."""
    import torch

    torch.manual_seed(0)
    theirs = wan_transformer(CONFIG)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            std = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
            gain = name.endswith("weight") and p.ndim == 1
            p.copy_(torch.randn(p.shape) * std + gain)
    weights = {name: p.detach().numpy() for name, p in theirs.state_dict().items()}

    abstract = params.abstract(lambda key: WorldDiT(CONFIG, key))
    table = diffusers_dit_table(CONFIG)
    slots = expand(table, {name: p.shape for name, p in params.flat_params(abstract).items()})
    ours = fill(abstract, table, Arrays(weights))
    return theirs, ours, slots


def test_forward_and_gradients_equal_diffusers(peers):
    import torch

    theirs, ours, slots = peers
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    latents, given = draw(B, T, H, W, 16), draw(B, T, H, W, 20)
    text, weight = draw(B, CONFIG.text_len, CONFIG.text_dim), draw(B, T, H, W, 16)
    text[:, 5:] = 0
    level = np.array([731.0, 12.0], np.float32)

    first = lambda x: torch.tensor(np.moveaxis(x, -1, 1))
    x = torch.cat([first(latents), first(given)], 1).requires_grad_()
    out = theirs(x, torch.tensor(level), torch.tensor(text), return_dict=False)[0]
    (out * first(weight)).sum().backward()
    last = lambda x: np.moveaxis(x.detach().numpy(), 1, -1)

    @jax.jit
    def run(model, latents):
        condition = Condition(
            jnp.asarray(text), None, jnp.asarray(given[..., :4]), jnp.asarray(given[..., 4:])
        )
        timestep = jnp.broadcast_to(level[:, None], (B, T))
        velocity, pull = jax.vjp(lambda m, x: m(x, timestep, condition), model, latents)
        return velocity, *pull(jnp.asarray(weight))

    velocity, d_model, d_latents = run(ours, jnp.asarray(latents))
    scale = np.abs(last(out)).max()
    assert 0.3 < scale < 30
    np.testing.assert_allclose(velocity, last(out), atol=1e-4)

    expected = last(x.grad)[..., :16]
    np.testing.assert_allclose(d_latents, expected, atol=1e-3 * np.abs(expected).max())
    flat = params.flat_params(d_model)
    for name in ("blocks.1.attn1.to_q.weight", "patch_embedding.weight", "blocks.0.scale_shift_table"):
        slot = slots[name]
        mine = np.asarray(flat[slot.entry.ours])[... if slot.layer is None else slot.layer]
        expected = theirs.get_parameter(name).grad.numpy()
        np.testing.assert_allclose(
            slot.entry.to_published(mine)[0], expected, atol=1e-3 * np.abs(expected).max(), err_msg=name
        )
