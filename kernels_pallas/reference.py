"""Attention in plain JAX: the reference of the kernels, and the blocked form that runs on CPUs.

`attention` is ten lines of mathematics. `blocked_attention` computes the same with memory that does not grow
with n * m, forward and backward, and is what the models use on a CPU. XLA:CPU decides its shape:
products run 3 to 5 times faster in `b h n k` order than in `b n h k`; a score tile that stays in the L2 cache
costs no page faults, which are the greater part of a naive forward at 1,560 tokens; a mask made of key intervals
needs no mask at all, each block of queries takes slices of the keys.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.context import Context
from kernels_pallas.mask import Mask

DENSE_TOKENS = 512  # up to here the probabilities are one array, kept for the backward pass
TILE_FLOATS = 1 << 19  # of scores at a time beyond that: 2 MiB, which stays in the cache
BLOCK_K = 4096  # keys of a tile at most; more are merged online
MASK_VALUE = -1e30  # a finite bound on a row maximum: a row without any key gives zeros, not NaN


def attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    mask: Mask | None = None,
    *,
    context: Context | None = None,
    key_lengths: Int[Array, "b"] | None = None,
) -> Float[Array, "b n h k"]:
    """softmax(q k^T / sqrt(head_dim)) v over the visible keys; a query that sees none gives zeros.

    Args:
      mask: visibility of the own keys k; None is full.
      context: keys and values every query sees besides, where its slots are valid.
      key_lengths: keys of k that exist, per sample; the rest is padding.
    """
    seen = jnp.ones((1, q.shape[1], k.shape[1]), bool) if mask is None else jnp.asarray(mask.dense())[None]
    if key_lengths is not None:
        seen = seen & (jnp.arange(k.shape[1]) < key_lengths[:, None, None])
    if context is not None:
        slots = jnp.broadcast_to(context.visible(), (*seen.shape[:2], context.slots))
        seen = jnp.concatenate([slots, seen], axis=2)
        k = jnp.concatenate([context.keys, k], axis=1)
        v = jnp.concatenate([context.values, v], axis=1)
    scores = jnp.einsum("bnhk,bmhk->bhnm", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    p = jnp.exp(scores - jax.lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), MASK_VALUE)))
    p = p / jnp.maximum(p.sum(-1, keepdims=True), jnp.finfo(p.dtype).tiny)
    return jnp.einsum("bhnm,bmhk->bnhk", p, v, preferred_element_type=jnp.float32).astype(q.dtype)


# Below, g = batch x heads flattened, q is scaled by 1/sqrt(head_dim), and `bias` is 0 where a key is visible
# and -inf where it is not; it is not differentiated.


def _exp_scores(q, k, bias):
    """exp(s - max), max and sum over the keys of one tile; bias broadcasts to `[g n m]`."""
    s = jnp.einsum("gnk,gmk->gnm", q, k) + bias
    top = jnp.maximum(s.max(-1, keepdims=True), MASK_VALUE)
    p = jnp.exp(s - top)
    return p, top, _positive(p.sum(-1, keepdims=True))


def _positive(total):
    return jnp.maximum(total, jnp.finfo(total.dtype).tiny)


@jax.custom_vjp
def _dense(q, k, v, bias):
    p, _, total = _exp_scores(q, k, bias)
    return jnp.einsum("gnm,gmk->gnk", p, v) / total


def _dense_forward(q, k, v, bias):
    p, _, total = _exp_scores(q, k, bias)
    p = p / total  # kept normalised: the backward pass then reads it as it is
    out = jnp.einsum("gnm,gmk->gnk", p, v)
    return out, (q, k, v, bias, p, out)


def _dense_backward(saved, g):
    q, k, v, bias, p, out = saved
    ds = p * (jnp.einsum("gnk,gmk->gnm", g, v) - (g * out).sum(-1, keepdims=True))
    dq, dk = jnp.einsum("gnm,gmk->gnk", ds, k), jnp.einsum("gnm,gnk->gmk", ds, q)
    return dq, dk, jnp.einsum("gnm,gnk->gmk", p, g), jnp.zeros_like(bias)


_dense.defvjp(_dense_forward, _dense_backward)


def _cut(x, groups, blocks):
    """[g n k] -> [g / groups, blocks, groups, n / blocks, k]."""
    g, n, k = x.shape
    return x.reshape(g // groups, groups, blocks, n // blocks, k).swapaxes(1, 2)


def _join(x):
    """Undoes `_cut`."""
    x = x.swapaxes(1, 2)
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2] * x.shape[3], x.shape[4])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(cut, q, k, v, bias):
    """`cut` = (heads of a tile, query blocks, key blocks); bias `[g m 1]`."""
    return _tiled_forward(cut, q, k, v, bias)[0]


def _tiled_forward(cut, q, k, v, bias):
    heads, blocks_q, blocks_k = cut

    def key_block(q, carry, tile):
        out, top, total = carry
        k, v, bias = tile
        p, tile_top, tile_total = _exp_scores(q, k, bias.swapaxes(1, 2))
        best = jnp.maximum(top, tile_top)
        old, new = jnp.exp(top - best), jnp.exp(tile_top - best)
        out = out * old + jnp.einsum("gnm,gmk->gnk", p, v) * new
        return (out, best, total * old + tile_total * new), None

    def query_block(keys, q):
        row = jnp.zeros_like(q[..., :1])
        (out, top, total), _ = jax.lax.scan(
            functools.partial(key_block, q), (jnp.zeros_like(q), row + MASK_VALUE, row), keys
        )
        total = _positive(total)
        return out / total, top + jnp.log(total)

    def group(arrays):
        q, *keys = arrays
        return jax.lax.map(functools.partial(query_block, keys), q)

    out, lse = jax.lax.map(
        group, [_cut(q, heads, blocks_q)] + [_cut(x, heads, blocks_k) for x in (k, v, bias)]
    )
    out, lse = _join(out), _join(lse)
    return out, (q, k, v, bias, out, lse)


def _tiled_backward(cut, saved, g):
    """Each tile's probabilities again from the scores and the log-sum-exp."""
    q, k, v, bias, out, lse = saved
    heads, blocks_q, blocks_k = cut
    delta = (g * out).sum(-1, keepdims=True)

    def query_block(keys, carry, rows):
        k, v, bias = keys
        q, lse, g, delta = rows
        p = jnp.exp(jnp.einsum("gnk,gmk->gnm", q, k) + bias.swapaxes(1, 2) - lse)
        ds = p * (jnp.einsum("gnk,gmk->gnm", g, v) - delta)
        dk, dv = carry[0] + jnp.einsum("gnm,gnk->gmk", ds, q), carry[1] + jnp.einsum("gnm,gnk->gmk", p, g)
        return (dk, dv), jnp.einsum("gnm,gmk->gnk", ds, k)

    def key_block(rows, dq, keys):
        start = (jnp.zeros_like(keys[0]), jnp.zeros_like(keys[1]))
        gradient, part = jax.lax.scan(functools.partial(query_block, keys), start, rows)
        return dq + part, gradient

    def group(arrays):
        rows, keys = arrays
        dq, (dk, dv) = jax.lax.scan(functools.partial(key_block, rows), jnp.zeros_like(rows[0]), keys)
        return dq, dk, dv

    rows = [_cut(x, heads, blocks_q) for x in (q, lse, g, delta)]
    keys = [_cut(x, heads, blocks_k) for x in (k, v, bias)]
    dq, dk, dv = (_join(x) for x in jax.lax.map(group, (rows, keys)))
    return dq, dk, dv, jnp.zeros_like(bias)


_tiled.defvjp(_tiled_forward, _tiled_backward)


def _pad(x, n, value=0.0):
    return jnp.pad(x, ((0, 0), (0, n - x.shape[1]), (0, 0)), constant_values=value)


def _tiles(q, k, v, bias):
    """`_tiled` for any lengths: equal blocks, the rest of the last one padded."""
    g, n, _ = q.shape
    m = k.shape[1]
    if m == 0:
        return jnp.zeros_like(q)
    blocks_k = -(-m // BLOCK_K)
    block_k = -(-m // blocks_k)
    blocks_q = max(1, -(-n * block_k // TILE_FLOATS))
    block_q = -(-n // blocks_q)
    heads = max(h for h in range(1, g + 1) if g % h == 0 and (h == 1 or h * block_q * block_k <= TILE_FLOATS))
    q = _pad(q, blocks_q * block_q)
    k, v = (_pad(x, blocks_k * block_k) for x in (k, v))
    bias = _pad(bias, blocks_k * block_k, -jnp.inf)
    return _tiled((heads, blocks_q, blocks_k), q, k, v, bias)[:, :n]


def blocked_attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    mask: Mask | None = None,
    *,
    context: Context | None = None,
    key_lengths: Int[Array, "b"] | None = None,
) -> Float[Array, "b n h k"]:
    """`attention` with flat memory, for CPUs. Arguments and result are those of `attention`.

    Computes in float32 whatever the inputs are (XLA:CPU has slow bfloat16 products).
    """
    b, n, h, d = q.shape
    own = jnp.ones((1, k.shape[1]), bool)
    if key_lengths is not None:
        own = jnp.arange(k.shape[1]) < key_lengths[:, None]
    mask = Mask.full(n, k.shape[1]) if mask is None else mask
    slots = 0
    if context is not None:
        slots = context.slots
        k = jnp.concatenate([context.keys, k], axis=1)
        v = jnp.concatenate([context.values, v], axis=1)
        own = jnp.concatenate([jnp.broadcast_to(context.visible(), (len(own), slots)), own], axis=1)
    flat = lambda x: x.astype(jnp.float32).swapaxes(1, 2).reshape(b * h, x.shape[1], d)
    keys = flat(k), flat(v)
    bias = jnp.repeat(jnp.where(own, 0.0, -jnp.inf), b * h // len(own), axis=0)[:, :, None]
    dtype, q = q.dtype, flat(q) / math.sqrt(d)
    if max(n, k.shape[1]) <= DENSE_TOKENS:
        hidden = np.pad(np.where(mask.dense(), 0.0, -np.inf), ((0, 0), (slots, 0)))
        out = _dense(q, *keys, bias.swapaxes(1, 2) + hidden.astype(np.float32))
    else:
        blocks = []
        for rows in mask.rows:
            spans = [slice(0, slots)] + [slice(slots + start, slots + stop) for start, stop in rows.keys]
            seen = [jnp.concatenate([x[:, span] for span in spans], axis=1) for x in (*keys, bias)]
            blocks.append(_tiles(q[:, rows.start : rows.stop], *seen))
        out = jnp.concatenate(blocks, axis=1)
    return out.reshape(b, h, n, d).swapaxes(1, 2).astype(dtype)
