"""Backward attention kernel: dq, dk and dv, or dq alone, in one pass over the visible tiles.

With P = exp2(S - lse) and dS = P (dO V^T - delta), delta = rowsum(dO O), a tile adds to dV, dK and dQ. Two forms:

    rows     scores [keys queries]: dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T. No large operand is transposed; for
             128x128 matrix units, which head_dim 128 fills in any orientation.
    columns  scores [queries keys]: dV^T += dO^T P, dK^T += Q^T dS, dQ^T += K^T dS^T. P and dS are the operands that are
             pushed, which fills a 256x256 unit at head_dim 128: 3.5 instead of 5 units of time a tile. S and dO V^T
             fill half of its depth at head_dim 128; -lse and -delta go into the other half, as channels of q and
             dO that meet ones in k and v, so the unit subtracts them for nothing (`with_offset`).

Keys that take no gradient (a cache's) need three of the five products: S, dO V^T and dQ (`key_grads`).

dQ^T stays in VMEM for all queries of a head (4 bytes x n x head_dim) until the head is done, so no partial sums
go to HBM. Nothing depends on a maximum: the log-sum-exp is exact, every P is at most 1.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels_pallas.flash_forward import (
    LOG2_E,
    NN,
    NT,
    block_spec,
    dot,
    heads_apart,
    heads_last,
    keep_rows,
    key_bias,
    visible,
)
from kernels_pallas.steps import CLEAR, FIRST, LAST, MASKED, Plan, key_block, query_block
from kernels_pallas.tiles import BackwardTiles


def _transpose(x):
    # Through float32: transposing bfloat16 would be turned into a product, which takes the matrix unit's time.
    return x.astype(jnp.float32).T.astype(x.dtype)


def _depth(head_dim: int) -> int:
    """Channels of q and dO in the form "columns": head_dim and three for the offset, in whole registers."""
    return -(-(head_dim + 3) // 128) * 128


def with_offset(x: Float[Array, "b n h k"], offset: Float[Array, "b h n"]) -> Array:
    """`x` with `offset` in three more channels, whose sum is the offset to float32's precision, and then zeros.

    A product with ones for those channels adds the offset: three bfloat16 hold the 24 bits of a float32.
    """
    parts, rest = [], offset
    for _ in range(3):
        # Rounded in a way XLA cannot take for excess precision to be simplified away.
        parts.append(lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
        rest -= parts[-1]
    more = jnp.stack(parts, axis=-1).swapaxes(1, 2).astype(x.dtype)
    width = _depth(x.shape[3]) - x.shape[3] - 3
    return jnp.concatenate([x, jnp.pad(more, ((0, 0), (0, 0), (0, 0), (0, width)))], axis=-1)


def _kernel(
    *refs,
    plan: Plan,
    tiles: BackwardTiles,
    key_grads: bool,
    heads: int,
    head_dim: int,
    scale: float,
    interpret: bool,
):
    refs = list(refs)
    take = lambda n, when=True: [refs.pop(0) for _ in range(n)] if when else [None] * n
    (steps,) = take(1)
    (valid,) = take(1, plan.limited)
    q_ref, k_ref, v_ref, g_ref = take(4)
    lse_ref, delta_ref = take(2, tiles.form == "rows")
    q_t, g_t = take(2, tiles.form == "columns" and key_grads)
    (bounds_ref,) = take(1, plan.intervals > 0)
    (dq_hbm,) = take(1)
    dk_ref, dv_ref = take(2, key_grads)
    dq_t, k_t, dq_rows = take(3)
    dk, dv = take(2, key_grads)
    (v_t,) = take(1, tiles.form == "columns")
    bh, i = pl.program_id(0), pl.program_id(1)
    sample, head = bh // heads, lax.rem(bh, heads)
    step = steps[lax.rem(sample, steps.shape[0]), i]
    valid_row = lax.rem(sample, valid.shape[0]) if plan.limited else 0
    at, row = key_block(step), query_block(step)
    by_columns = tiles.form == "columns"

    @pl.when(i == 0)
    def _():
        def clear(j, _):
            dq_t[j] = jnp.zeros(dq_t.shape[1:], dq_t.dtype)
            return 0

        lax.fori_loop(0, dq_t.shape[0], clear, 0)

    @pl.when(step & FIRST != 0)
    def _():
        if key_grads:
            dk[...] = jnp.zeros_like(dk)
            dv[...] = jnp.zeros_like(dv)
        left = plan.mask.m - at * tiles.block_k
        k_t[:head_dim] = _transpose(keep_rows(k_ref[0], left))
        if by_columns:
            v_t[:head_dim] = _transpose(keep_rows(v_ref[0], left))
            for ref in (k_t, v_t):
                # Beside the three channels of an offset q and dO hold zeros.
                ref[head_dim:] = jnp.ones((ref.shape[0] - head_dim, tiles.block_k), ref.dtype)

    def hide(s, bounds, keys, axis):
        """-inf where hidden; keys lie along `axis` of the scores."""
        if plan.limited or not plan.intervals:
            s += key_bias(valid, valid_row, keys, plan)
        if not plan.intervals:
            return s
        return jnp.where(visible(bounds, keys.astype(bounds.dtype), plan, axis), s, -jnp.inf)

    def tile_rows(masked):
        left = plan.mask.m - at * tiles.block_k
        for offset in range(0, tiles.block_k, tiles.chunk):
            span = slice(offset, offset + tiles.chunk)
            k, v = k_ref[0, span], v_ref[0, span]
            if masked:
                k, v = keep_rows(k, left - offset), keep_rows(v, left - offset)
            s = dot(k, q_ref[0], NT) * (scale * LOG2_E)
            if masked:
                keys = at * tiles.block_k + offset + lax.broadcasted_iota(jnp.int32, (tiles.chunk, 1), 0)
                s = hide(s, bounds_ref[...] if plan.intervals else None, keys, 0)
            p = jnp.exp2(s - lse_ref[0])
            ds = (p * (dot(v, g_ref[0], NT) - delta_ref[0])).astype(q_ref.dtype)
            if key_grads:
                dv[span] += dot(p.astype(g_ref.dtype), g_ref[0], NN)
                dk[span] += dot(ds, q_ref[0], NN)
            dq_t[row] += dot(k_t[:, span], ds, NN)

    def tile_columns(masked):
        if masked:
            # Transposed as float32, exact because token counts are below 2^24.
            bounds = bounds_ref[...].astype(jnp.float32).T if plan.intervals else None
            keys = at * tiles.block_k + lax.broadcasted_iota(jnp.int32, (1, tiles.block_k), 1)
        for offset in range(0, tiles.block_q, tiles.chunk):
            span = slice(offset, offset + tiles.chunk)
            s = dot(q_ref[0, span], k_t[...], NN) * (scale * LOG2_E)
            if masked:
                s = hide(s, bounds[span] if plan.intervals else None, keys, 1)
            p = jnp.exp2(s)
            ds = (p * dot(g_ref[0, span], v_t[...], NN)).astype(q_ref.dtype)
            if key_grads:
                dv[...] += dot(g_t[0, :, span], p.astype(g_ref.dtype), NN)
                dk[...] += dot(q_t[0, :, span], ds, NN)
            # In some interpreted programs XLA:CPU of JAX 0.12 makes this a product of two transposed bfloat16 operands
            # and then refuses it ("Unsupported element type for DotThunk"). Products of bfloat16 are exact in float32.
            wide = lambda x: x.astype(jnp.float32) if interpret else x
            dq_t[row, :, span] += dot(wide(k_t[:head_dim]), wide(ds), NT)

    tile = tile_columns if by_columns else tile_rows
    pl.when(step & CLEAR != 0)(lambda: tile(masked=False))
    if plan.any_masked:
        pl.when(step & MASKED != 0)(lambda: tile(masked=True))

    if key_grads:

        @pl.when(step & LAST != 0)
        def _():
            out = lambda x: x[...].T if by_columns else x[...]
            dk_ref[0] = (out(dk) * scale).astype(dk_ref.dtype)
            dv_ref[0] = out(dv).astype(dv_ref.dtype)

    @pl.when(i == pl.num_programs(1) - 1)
    def _():
        def write(j, _):
            dq_rows[...] = (dq_t[j] * scale).T.astype(dq_rows.dtype)
            rows = pl.ds(j * tiles.block_q, tiles.block_q)
            if head_dim % 128 == 0:
                to = dq_hbm.at[sample, rows, pl.ds(head * head_dim, head_dim)]
            else:
                to = dq_hbm.at[bh, rows]
            pltpu.sync_copy(dq_rows, to)
            return 0

        lax.fori_loop(0, dq_t.shape[0], write, 0)


def flash_backward(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    out: Float[Array, "b n h k"],
    lse: Float[Array, "b h n"],
    g: Float[Array, "b n h k"],
    plan: Plan,
    tiles: BackwardTiles,
    *,
    valid: Int[Array, "b 4 2"] | None = None,
    key_grads: bool = True,
    dq_dtype: DTypeLike | None = None,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """Gradients of attention: (dq, dk, dv) like q, k and v; (dq,) without `key_grads`.

    Args:
      out, lse: of `flash_forward` (lse is the natural logarithm). g: cotangent of `out`.
      plan: by "keys", with the tile of `tiles`. valid: for a limited plan, as `Plan.valid`.
      dq_dtype: of dq; None is q's. float32 for dq over some of the keys, which is yet to be summed.
    """
    b, n, h, d = q.shape
    m = k.shape[1]
    blocks_q = -(-n // tiles.block_q)
    padded = blocks_q * tiles.block_q
    delta = jnp.einsum("bnhk,bnhk->bhn", g.astype(jnp.float32), out.astype(jnp.float32))

    def pad(x, axis):
        # Zero rows of q and g add nothing to dk and dv; garbage would.
        width = [(0, 0)] * x.ndim
        width[axis] = (0, padded - n)
        return jnp.pad(x, width) if padded > n else x

    row_block = lambda bh, i, steps, *_: query_block(steps[lax.rem(bh // h, steps.shape[0]), i])
    key_spec = block_spec(tiles.block_k, h, d, key_block)
    if tiles.form == "columns":
        rows = [with_offset(q, -lse / d**-0.5), with_offset(g, -delta)]
        # Transposed once here, not once a tile: the transpose unit is short of time in this form.
        turn = (q, g) if key_grads else ()
        more = [pad(x, 1).transpose(0, 2, 3, 1).reshape(b * h, d, padded) for x in turn]
        more_spec = pl.BlockSpec((1, d, tiles.block_q), lambda bh, *s: (bh, 0, row_block(bh, *s)))
    else:
        rows = [q, g]
        more = [pad(x, 2).reshape(b * h, 1, padded) for x in (lse * LOG2_E, delta)]
        more_spec = pl.BlockSpec((1, 1, tiles.block_q), lambda bh, *s: (bh, 0, row_block(bh, *s)))
    query_spec = block_spec(tiles.block_q, h, rows[0].shape[3], query_block)
    rows = [heads_last(pad(x, 1)) for x in rows]
    operands = [rows[0], heads_last(k), heads_last(v), rows[1], *more]
    specs = [query_spec, key_spec, key_spec, query_spec, *[more_spec] * len(more)]
    if plan.intervals:
        operands.append(pad(jnp.asarray(plan.bounds()), 1))
        specs.append(pl.BlockSpec((8, tiles.block_q), lambda bh, *s: (0, row_block(bh, *s))))
    prefetch = [plan.dynamic(valid), valid] if plan.limited else [jnp.asarray(plan.static())[None]]
    vmem, by_columns = pltpu.VMEM, tiles.form == "columns"
    keys = (d, tiles.block_k) if by_columns else (tiles.block_k, d)
    turned = (_depth(d) if by_columns else d, tiles.block_k)
    dq_shape = jax.eval_shape(lambda x: heads_last(pad(x, 1)).astype(dq_dtype or x.dtype), q)
    scratch = [
        vmem((blocks_q, d, tiles.block_q), jnp.float32),
        vmem(turned, k.dtype),
        vmem((tiles.block_q, d), dq_shape.dtype),
    ]
    if key_grads:
        scratch += [vmem(keys, jnp.float32)] * 2
    if by_columns:
        scratch.append(vmem(turned, v.dtype))
    dq, *dkv = pl.pallas_call(
        functools.partial(
            _kernel,
            plan=plan,
            tiles=tiles,
            key_grads=key_grads,
            heads=h,
            head_dim=d,
            scale=d**-0.5,
            interpret=interpret,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(b * h, prefetch[0].shape[1]),
            in_specs=specs,
            out_specs=[pl.BlockSpec(memory_space=pl.ANY), *[key_spec, key_spec] * key_grads],
            scratch_shapes=scratch,
        ),
        out_shape=[dq_shape, *operands[1:3] * key_grads],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem_limit
        ),
        interpret=interpret,
        name=f"flash_backward_{'' if key_grads else 'dq_'}{tiles.form}",
    )(*prefetch, *operands)
    dq = heads_apart(dq, (b, padded, h, d))[:, :n]
    return dq, *(heads_apart(x, (b, m, h, d)) for x in dkv)
