"""The plain form and the blocked CPU form against float64 NumPy, forward and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import reference
from kernels_pallas.context import Context, valid_slots
from kernels_pallas.mask import Mask
from tests.kernels import numpy_reference

CASES = {
    "full": dict(n=40, mask=None),
    "block causal": dict(n=45, mask=Mask.block_causal(45, 12)),
    "window and sink": dict(n=45, mask=Mask.block_causal(45, 9, 27, 9)),
    "lengths": dict(n=30, m=50, mask=Mask.full(30, 50).limit(47), lengths=[0, 41]),
    "context": dict(n=24, mask=Mask.block_causal(24, 12), slots=70, lengths=[24, 13]),
}


def arrays(n, m, slots, b=2, h=3, d=16):
    make = lambda key, tokens: jax.random.normal(jax.random.key(key), (b, tokens, h, d))
    context = (
        Context(make(4, slots), make(5, slots), valid_slots((0, 9), (60, slots), (20, 25))) if slots else None
    )
    return make(0, n), make(1, m), make(2, m), make(3, n), context


def dense(n, m, mask, lengths, context):
    seen = np.ones((2, n, m), bool) if mask is None else np.repeat(mask.dense()[None], 2, 0)
    if lengths is not None:
        seen &= np.arange(m) < np.array(lengths)[:, None, None]
    if context is None:
        return seen
    slots = np.zeros((2, n, context.slots), bool)
    for start, stop in np.asarray(context.valid):
        slots[..., start:stop] = True
    return np.concatenate([slots, seen], axis=2)


@pytest.mark.parametrize("way", ["plain", "dense", "tiled"])
@pytest.mark.parametrize("case", CASES)
def test_equals_float64(case, way, monkeypatch):
    case = CASES[case]
    n, mask = case["n"], case["mask"]
    m, slots, lengths = case.get("m", n), case.get("slots", 0), case.get("lengths")
    if way == "tiled":  # several query blocks, key blocks and heads a tile
        for name, value in dict(DENSE_TOKENS=0, BLOCK_K=17, TILE_FLOATS=400).items():
            monkeypatch.setattr(reference, name, value)
    fn = reference.attention if way == "plain" else reference.blocked_attention
    q, k, v, g, context = arrays(n, m, slots)
    key_lengths = None if lengths is None else jnp.array(lengths)

    @jax.jit
    def run(q, k, v, g):
        out, vjp = jax.vjp(lambda *x: fn(*x, mask, context=context, key_lengths=key_lengths), q, k, v)
        return out, *vjp(g)

    got = run(q, k, v, g)
    both = (
        (np.concatenate([old, new], axis=1) for old, new in ((context.keys, k), (context.values, v)))
        if slots
        else (k, v)
    )
    out, dq, dk, dv = numpy_reference.attention(q, *both, dense(n, m, mask, lengths, context), g)
    for name, x, want in zip(
        ("out", "dq", "dk", "dv"), got, (out, dq, dk[:, slots:], dv[:, slots:]), strict=True
    ):
        np.testing.assert_allclose(x, want, rtol=2e-5, atol=2e-5, err_msg=name)


def test_blocked_memory_is_flat():
    """Temporaries of forward and backward stay far below one n x m array of scores."""
    n = 4096
    x = jax.ShapeDtypeStruct((1, n, 2, 32), jnp.float32)
    loss = lambda q, k, v: reference.blocked_attention(q, k, v).sum()
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * n * n * 4 / 4


def test_bfloat16_in_bfloat16_out():
    q, k, v, _, _ = (None if x is None else x.astype(jnp.bfloat16) for x in arrays(20, 20, 0))
    got = reference.blocked_attention(q, k, v)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        got.astype(jnp.float32), reference.attention(q, k, v).astype(jnp.float32), atol=0.02
    )
