"""Ulysses, ring and both on eight devices equal attention on one: output and gradients, float32."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from kernels_pallas.context import Context, valid_slots
from kernels_pallas.mask import Mask
from kernels_pallas.reference import attention
from lingbot_jax.config import ConfigError
from lingbot_jax.parallel.mesh import MeshConfig, make_mesh
from lingbot_jax.parallel.sequence import PLAIN, SequenceAttention, local_mask

FRAMES, FRAME, HEADS, SIZE = 6, 16, 8, 8
TOKENS = FRAMES * FRAME
MASKS = {
    "full": None,
    "block_causal": Mask.block_causal(TOKENS, 2 * FRAME),
    "window_sink": Mask.block_causal(TOKENS, 2 * FRAME, window=4 * FRAME, sink=FRAME),
}


def arrays(batch):
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (batch, FRAMES, FRAME, HEADS, SIZE)) for key in keys]


def reference(q, k, v, mask):
    flat = [x.reshape(x.shape[0], TOKENS, HEADS, SIZE) for x in (q, k, v)]
    return attention(*flat, mask).reshape(q.shape)


def with_gradients(function):
    def scalar(q, k, v, weight):
        out = function(q, k, v)
        return (out * weight).sum(), out

    return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True))


@functools.cache
def want(batch, mask):
    return with_gradients(lambda q, k, v: reference(q, k, v, MASKS[mask]))(*arrays(batch))


@pytest.mark.parametrize(
    "sizes, ulysses, mask",
    [
        ((1, 1, 8), 8, "full"),
        ((1, 1, 8), 8, "block_causal"),
        ((1, 1, 8), 1, "full"),
        ((1, 1, 8), 1, "block_causal"),
        ((1, 1, 8), 4, "full"),
        ((1, 1, 8), 2, "block_causal"),
        ((2, 2, 2), 1, "window_sink"),
        ((1, 2, 4), 4, "window_sink"),
    ],
)
def test_equals_one_device(sizes, ulysses, mask):
    mesh = make_mesh(MeshConfig(*sizes))
    batch = sizes[0] * sizes[1]
    parallel = SequenceAttention(mesh, HEADS, PLAIN, ulysses)
    (_, want_out), want_gradients = want(batch, mask)
    (_, out), gradients = with_gradients(lambda q, k, v: parallel(q, k, v, MASKS[mask]))(*arrays(batch))
    np.testing.assert_allclose(out, want_out, atol=2e-6)
    for name, got, wanted in zip("qkv", gradients, want_gradients, strict=True):
        np.testing.assert_allclose(got, wanted, atol=5e-6, err_msg=f"gradient of {name}")


def test_every_device_sees_the_local_mask():
    """The mask of one ring step, against the global mask at the tokens the two devices really hold."""
    mask = MASKS["window_sink"]
    local = local_mask(mask, FRAME, 8).dense()
    index = np.arange(TOKENS).reshape(FRAMES, 8, FRAME // 8)
    for queries in range(8):
        for keys in range(8):
            rows, columns = index[:, queries].ravel(), index[:, keys].ravel()
            np.testing.assert_array_equal(mask.dense()[np.ix_(rows, columns)], local)


def test_a_cache_is_read_by_ulysses_and_refused_by_a_ring():
    q, k, v, _ = arrays(batch=1)
    slots = jax.random.normal(jax.random.key(5), (2, 1, 24, HEADS, SIZE))
    context = Context(*slots, valid_slots((0, 4), (10, 24)))
    mesh = make_mesh(MeshConfig(1, 1, 8))
    got = jax.jit(SequenceAttention(mesh, HEADS, PLAIN, 8))(q, k, v, None, context)
    flat = [x.reshape(1, TOKENS, HEADS, SIZE) for x in (q, k, v)]
    np.testing.assert_allclose(got, attention(*flat, context=context).reshape(q.shape), atol=2e-6)
    with pytest.raises(ConfigError, match="must be all 8 devices of the seq axis"):
        SequenceAttention(mesh, HEADS, PLAIN, 2)(q, k, v, None, context)


def test_uneven_counts_are_refused_at_the_start():
    mesh = make_mesh(MeshConfig(1, 1, 8))
    with pytest.raises(ConfigError, match="tokens per latent frame: 12 does not divide over seq = 8"):
        parallel = SequenceAttention(mesh, HEADS, PLAIN)
        jax.eval_shape(lambda x: parallel(x, x, x, None), jnp.zeros((1, 6, 12, 8, 8)))
    with pytest.raises(ConfigError, match="heads = 12: must divide over a Ulysses group of 8 devices"):
        SequenceAttention(mesh, 12, PLAIN, 8)
    with pytest.raises(ConfigError, match="ulysses = 3: must divide the 8 devices"):
        SequenceAttention(mesh, 12, PLAIN, 3)
    assert SequenceAttention(mesh, 12, PLAIN).ulysses == 4
    with pytest.raises(ConfigError, match="mask = 24: its boundaries must be multiples of the 16"):
        parallel = SequenceAttention(mesh, HEADS, PLAIN)
        jax.eval_shape(lambda x: parallel(x, x, x, Mask.block_causal(96, 24)), jnp.zeros((1, 6, 16, 8, 8)))


def bodies(jaxpr):
    """The bodies of all loops of a program, however deep."""
    for equation in jaxpr.eqns:
        loop = equation.primitive.name in ("scan", "while")
        for sub in jaxprs_in_params(equation.params):
            if loop:
                yield sub
            yield from bodies(sub)


def ring_faults(parallel: SequenceAttention) -> list[str]:
    """What keeps forward and backward from being a ring whose transport hides behind its work."""
    x = jax.ShapeDtypeStruct((1, FRAMES, FRAME, HEADS, SIZE), jnp.float32)
    loss = lambda q, k, v: (parallel(q, k, v, None) ** 2).sum()
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, x, x)
    faults, sent = [], []
    for body in bodies(traced.jaxpr.jaxpr):
        moves = [e for e in body.eqns if e.primitive.name == "ppermute"]
        sent.append(len(moves))
        # What a step sends is what it was handed: it need not wait for the step's products.
        if any(v not in body.invars for e in moves for v in e.invars):
            faults.append("a step sends what it computes first")
    if sent != [2, 4]:  # k and v; backward their gradients as well
        faults.append(f"sends per step: {sent}")
    text = traced.lower().compile().as_text()
    faults += [name for name in ("all-to-all", "all-gather", "all-reduce") if name in text]
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    if max(sizes) >= TOKENS * HEADS * SIZE:
        faults.append("an array of all tokens")
    return faults


def test_the_ring_overlaps_and_does_not_gather():
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, seq=8))
    assert ring_faults(SequenceAttention(mesh, HEADS, PLAIN, 1)) == []
    assert ring_faults(SequenceAttention(mesh, HEADS, PLAIN, 8))[:2] == ["sends per step: []", "all-to-all"]
