"""Generation on the CPU: our transformer against diffusers', and a cached chunk against the whole context.

Both sides of a ratio are timed in turn within one run; a row is the median of the ratios of neighbours, with
their quartiles. Wanted: at most 1.0 against diffusers, at least 3.0 for the cache.
"""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lingbot_jax.models import params
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.dit import Condition, WorldDiT
from lingbot_jax.rollout import causal, masks
from lingbot_jax.rollout.cache import KVCache
from lingbot_jax.rollout.causal import CausalConfig
from tests.parity.peers import wan_transformer

# One latent frame of 480p: 60 x 104 latent pixels, 1,560 tokens.
PEER = DiTConfig(
    dim=512,
    layers=8,
    heads=4,
    ffn=2048,
    text_dim=256,
    text_len=64,
    image_condition=False,
    control="none",
    dtype="float32",
)
CACHED = dataclasses.replace(PEER, dim=256, layers=4, heads=2, ffn=1024)
ROUNDS = 9


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _ratio(title: str, ours: Callable[[], object], other: Callable[[], object], rounds: int = ROUNDS) -> str:
    """One row: median and quartiles of time(ours) / time(other), after a warm-up of each."""
    _timed(ours), _timed(other)
    pairs = [(_timed(ours), _timed(other)) for _ in range(rounds)]
    low, middle, high = np.quantile([a / b for a, b in pairs], [0.25, 0.5, 0.75])
    seconds = np.median(pairs, axis=0)
    return (
        f"{title}: ratio {middle:.2f} (quartiles {low:.2f} to {high:.2f}, {rounds} rounds; "
        f"{seconds[0]:.3f} s and {seconds[1]:.3f} s)"
    )


def _random(config: DiTConfig) -> WorldDiT:
    """A model with random parameters of sensible size; nothing is compiled for it."""
    rng = np.random.default_rng(0)
    make = lambda p: jnp.asarray(rng.normal(size=p.shape) * p.shape[-1] ** -0.5, jnp.float32)
    return jax.tree.map(make, params.abstract(lambda key: WorldDiT(config, key)))


def against_diffusers() -> str:
    """Forward pass with the same float32 weights, inputs and two threads."""
    try:
        import torch

        torch.manual_seed(0)
        theirs = wan_transformer(PEER).eval()
    except ModuleNotFoundError as error:
        return f"forward, ours / diffusers: skipped, {error.name} is not installed (make bench installs it)"
    from lingbot_jax.convert.names_dit import diffusers_dit_table
    from lingbot_jax.convert.read import Arrays, fill

    weights = {name: p.detach().numpy() for name, p in theirs.state_dict().items()}
    abstract = params.abstract(lambda key: WorldDiT(PEER, key))
    ours = fill(abstract, diffusers_dit_table(PEER), Arrays(weights))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 1, 60, 104, 16)).astype(np.float32)
    text = rng.normal(size=(1, PEER.text_len, PEER.text_dim)).astype(np.float32)
    forward = jax.jit(lambda x, t, text: ours(x, t, Condition(text=text)))
    arguments = jnp.asarray(x), jnp.full((1, 1), 700.0), jnp.asarray(text)
    their_x, their_t = torch.tensor(np.moveaxis(x, -1, 1)), torch.tensor([700.0])
    their_text = torch.tensor(text)

    def peer():
        with torch.inference_mode():
            return theirs(their_x, their_t, their_text, return_dict=False)[0]

    difference = np.abs(np.moveaxis(peer().numpy(), 1, -1) - forward(*arguments)).max()
    assert difference < 1e-4, f"not the same function: {difference}"
    row = _ratio(
        "forward, dim 512, 8 layers, 1560 tokens, ours / diffusers",
        lambda: forward(*arguments).block_until_ready(),
        peer,
    )
    return f"{row} (wanted <= 1.00; {torch.get_num_threads()} torch threads)"


def cache_against_context(chunks: int = 7) -> str:
    """The next chunk behind a cache of `chunks` chunks, against one masked forward over all of it."""
    config = CausalConfig(chunk=1, window=None, sink=0, positions="absolute")
    height, width, frames = 24, 32, chunks + 1
    model, rng = _random(CACHED), np.random.default_rng(0)
    latents = jnp.asarray(rng.normal(size=(1, frames, height, width, 16)), jnp.float32)
    condition = Condition(text=jnp.asarray(rng.normal(size=(1, 64, CACHED.text_dim)), jnp.float32))
    level = jnp.full((1, frames), 500.0)
    tokens = height * width // 4
    mask = masks.chunks(frames, 1, tokens)
    whole = jax.jit(lambda model, x: model(x, level, condition, attend=Attend(mask=mask)))
    layout = config.layout(CACHED, height, width, frames)
    step = jax.jit(lambda model, cache, x: causal.forward_chunk(model, cache, x, level[:, :1], condition))
    cache = KVCache.empty(CACHED, layout, 1)
    for i in range(chunks):
        _, cache = step(model, cache, latents[:, i : i + 1])
    last = latents[:, -1:]
    difference = np.abs(step(model, cache, last)[0] - whole(model, latents)[:, -1:]).max()
    assert difference < 1e-3, f"not the same function: {difference}"
    row = _ratio(
        f"a chunk of {tokens} tokens after {chunks} chunks, whole context / cached",
        lambda: whole(model, latents).block_until_ready(),
        lambda: jax.block_until_ready(step(model, cache, last)),
    )
    return f"{row} (wanted >= 3.00)"


def run() -> list[str]:
    return [against_diffusers(), cache_against_context()]
