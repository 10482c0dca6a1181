"""Flash attention for `b n h k` on TPU, differentiable: masks, contexts, key lengths, any sequence length.

    kernel = functools.partial(flash_attention, generation=tiles.generation(jax.devices()[0]))
    out = kernel(q, k, v, mask, context=context)

Accuracy, bfloat16 inputs: q, k and v enter products as they are, scores and sums are float32, the probabilities
are rounded to bfloat16 (relative 2^-9) before they meet v, and the result once more. So against float64 on the
same inputs: |error| <= 2^-8 * (max|v| + max|out|), the bound the tests hold both forms to.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import tiles as tiles_lib
from kernels_pallas.context import Context
from kernels_pallas.flash_backward import flash_backward
from kernels_pallas.flash_forward import LOG2_E, flash_forward
from kernels_pallas.mask import Mask
from kernels_pallas.steps import Plan, valid_intervals
from kernels_pallas.tiles import Tiles

# Log2 of the largest exponential the fixed_max form may meet: 2^80, summed over 2^17 keys and times values of up
# to 2^VALUE_LOG2, stays below float32's 2^127; its inverse times 2^-VALUE_LOG2 stays above 2^-126.
SCORE_LOG2, VALUE_LOG2 = 80.0, 24.0


def fixed_max_is_safe(
    q: Float[Array, "b n h k"], k: Float[Array, "b m h k"], v: Float[Array, "b m h k"]
) -> Bool[Array, ""]:
    """Whether exponentials of the scores themselves, without any offset, stay inside float32 in every head.

    Range, for each sample and head on its own: |s| <= max|q| max|k| (Cauchy and Schwarz), and that times log2(e) /
    sqrt(head_dim) must be at most SCORE_LOG2; max|v| must be in [2^-VALUE_LOG2, 2^VALUE_LOG2] or 0. With q and k of
    root mean squares a and b in a head of 128 that is 16.3 a b: a b up to 4.9. NaN and infinite inputs are not safe.
    """
    norm = lambda x: jnp.sqrt(jnp.max(jnp.sum(jnp.square(x.astype(jnp.float32)), -1), axis=1))  # b h
    top = norm(q) * norm(k) * (LOG2_E / q.shape[-1] ** 0.5)
    size = jnp.max(jnp.abs(v.astype(jnp.float32)), axis=(1, 3))
    ordinary = (size == 0) | ((size >= 2.0**-VALUE_LOG2) & (size <= 2.0**VALUE_LOG2))
    return jnp.all((top <= SCORE_LOG2) & ordinary)


def _forward(q, k, v, context, key_lengths, mask, tiles, interpret):
    both = [
        functools.partial(
            flash_forward, mask=mask, form=form, interpret=interpret, tiles=getattr(tiles, form)
        )
        for form in ("stale_max", "fixed_max")
    ]
    safe = fixed_max_is_safe(q, k, v)
    if context is not None:
        safe &= fixed_max_is_safe(q, context.keys, context.values)
    run = lambda f: lambda q, k, v, context, lengths: f(q, k, v, context=context, key_lengths=lengths)
    return jax.lax.cond(safe, run(both[1]), run(both[0]), q, k, v, context, key_lengths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(q, k, v, context, key_lengths, mask, tiles, interpret):
    return _forward(q, k, v, context, key_lengths, mask, tiles, interpret)[0]


def _attention_forward(q, k, v, context, key_lengths, mask, tiles, interpret):
    out, lse = _forward(q, k, v, context, key_lengths, mask, tiles, interpret)
    return out, (q, k, v, context, key_lengths, out, lse)


def _attention_backward(mask, tiles, interpret, saved, g):
    q, k, v, context, key_lengths, out, lse = saved
    rows = out, lse, g
    valid = None if key_lengths is None else valid_intervals(len(q), 0, mask.m, None, key_lengths)
    if context is None:
        return *backward_segments(q, k, v, *rows, mask, tiles.backward, valid, interpret), None, None
    # Two passes, for nothing flows into the context: over its slots dq alone.
    part = functools.partial(
        backward_segments, tiles=tiles.backward, interpret=interpret, dq_dtype=jnp.float32
    )
    dq, dk, dv = part(q, k, v, *rows, mask, valid=valid)
    everything = Mask.full(mask.n, context.slots)
    slots = valid_intervals(1, context.slots, 0, context, None)
    (more,) = part(q, context.keys, context.values, *rows, everything, valid=slots, key_grads=False)
    return (dq + more).astype(q.dtype), dk, dv, None, None


def backward_segments(q, k, v, out, lse, g, mask, tiles, valid, interpret, **options):
    """`flash_backward`, which takes `options`, on as many queries at a time as its VMEM accumulator of dq holds."""
    n, d = q.shape[1], q.shape[3]
    most = max(1, tiles.accumulator_bytes // (4 * d * tiles.block_q)) * tiles.block_q
    parts = []
    for start in range(0, n, most):
        stop = min(start + most, n)
        cut = slice(start, stop)
        plan = Plan(
            mask.queries(start, stop), tiles.block_q, tiles.block_k, "keys", limited=valid is not None
        )
        arrays = q[:, cut], k, v, out[:, cut], lse[:, :, cut], g[:, cut]
        parts.append(flash_backward(*arrays, plan, tiles, valid=valid, interpret=interpret, **options))
    if len(parts) == 1:
        return parts[0]
    add = lambda xs: functools.reduce(jnp.add, [x.astype(jnp.float32) for x in xs]).astype(xs[0].dtype)
    dq, *dkv = zip(*parts, strict=True)
    return jnp.concatenate(dq, axis=1), *map(add, dkv)


_attention.defvjp(_attention_forward, _attention_backward)


def flash_attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    mask: Mask | None = None,
    *,
    generation: tiles_lib.Generation,
    context: Context | None = None,
    key_lengths: Int[Array, "b"] | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "b n h k"]:
    """softmax(q k^T / sqrt(head_dim)) v over the visible keys; a query that sees none gives zeros.

    Where norms show that no exponential can leave float32 the fixed_max kernel runs, otherwise, inside the same call,
    the stale_max one, which takes any scores and |v| <= 2^57 (`flash_forward` has its range).

    Args:
      mask: visibility of the own keys; None is full.
      generation: of the TPU, decides tiles and forms; see `tiles.generation`.
      context: cached keys and values every query sees besides; no gradient goes to it.
      key_lengths: own keys that exist, per sample.
      tiles: other tiles than the table's, for measurements.
      interpret: runs the kernels in Python on any backend, for tests.

    Raises:
      ValueError: shapes do not match, or head_dim is not 64 or a multiple of 128.
    """
    b, n, h, d = q.shape
    if k.shape != v.shape or k.shape[::2] != q.shape[::2] or k.shape[3] != d:
        raise ValueError(
            f"flash_attention: q {q.shape}, k {k.shape}, v {v.shape}: batch, heads, head_dim must agree"
        )
    if d != 64 and d % 128:
        raise ValueError(f"flash_attention: head_dim = {d}: must be 64 or a multiple of 128")
    mask = Mask.full(n, k.shape[1]) if mask is None else mask
    if (mask.n, mask.m) != (n, k.shape[1]):
        raise ValueError(f"flash_attention: mask of {mask.n} x {mask.m} for {n} queries, {k.shape[1]} keys")
    if context is not None:
        context = jax.lax.stop_gradient(context)
    if tiles is None:
        keys = mask.m if context is None else context.slots
        tiles = tiles_lib.choose(generation, n, keys, cached=context is not None)
    return _attention(q, k, v, context, key_lengths, mask, tiles, interpret)
