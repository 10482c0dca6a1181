"""Forward attention kernel in the transposed form, for every mask, with or without a context.

A tile holds the scores transposed, keys in sublanes and queries in lanes:

    S^T [block_k block_q] = K Q^T        P^T = exp2(S^T - offset)        O^T [k block_q] += V^T P^T

P^T is the operand that is pushed into the matrix unit. On the 256x256 units of v6e and tpu7x the second product
then fills the unit at head_dim 128 (1.5 instead of 2 times the ideal cycles in all); everywhere the sum over
keys runs over sublanes, so no lane reduction is needed, and the row sums are one row of lanes.

Nothing in a tile waits for the tile's own maximum. Two forms differ in the offset:

  fixed_max  the maximum is taken to be zero: no offset at all. Exact as long as no score leaves the range of
             float32 exponents, which `flash_attention` checks (|q| max|k| bounds the scores, and norms of q and k
             bound that) before it takes this form.
  stale_max  the maximum over the tiles before this one. A tile whose scores exceed that by more than JUMP (in log2)
             is computed once more with its own maximum; the first tile of a row always is.

Range of stale_max: scores in log2 within +-2^96 (they are float32: beyond 2^14 their own rounding shows), and
max|v| <= 2^STALE_MAX_VALUE_LOG2. A tile that stays just below JUMP adds block_k <= 2^10 terms of up to 2^60 |v|
before its sum is scaled down, and float32 ends at 2^128: larger values may give infinity or NaN.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.context import Context
from kernels_pallas.mask import Mask
from kernels_pallas.steps import CLEAR, FIRST, LAST, MASKED, Plan, key_block, query_block
from kernels_pallas.tiles import ForwardTiles

Form = Literal["fixed_max", "stale_max"]
LOG2_E = 1.4426950408889634
JUMP = 60.0  # log2
STALE_MAX_VALUE_LOG2 = 57.0  # 2^57 times 2^JUMP times the 2^10 keys of a tile stays inside float32
MOST_STEPS = 1 << 17  # of a call: half of the 1 MiB of scalar memory that v5p has
MASK_VALUE = -1e30  # a finite "no score yet"

NT = (((1,), (1,)), ((), ()))  # contract the last axes: x y^T
NN = (((1,), (0,)), ((), ()))


def dot(x, y, dims):
    return lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def heads_last(x: Float[Array, "b n h k"]) -> Array:
    """How kernels read `b n h k` without moving it where a head is whole lanes: `[b n h*k]`, else `[b*h n k]`."""
    b, n, h, d = x.shape
    if d % 128 == 0:
        return x.reshape(b, n, h * d)
    return x.swapaxes(1, 2).reshape(b * h, n, d)


def heads_apart(x: Array, shape: tuple[int, int, int, int]) -> Float[Array, "b n h k"]:
    """Undoes `heads_last`."""
    b, n, h, d = shape
    return x.reshape(b, n, h, d) if d % 128 == 0 else x.reshape(b, h, n, d).swapaxes(1, 2)


def block_spec(block: int, heads: int, head_dim: int, which) -> pl.BlockSpec:
    """One block of `heads_last` rows; `which(step)` is its index, `steps[sample, step]` prefetched first."""

    def index(bh, i, steps, *_):
        at = which(steps[lax.rem(bh // heads, steps.shape[0]), i])
        return (bh // heads, at, bh % heads) if head_dim % 128 == 0 else (bh, at, 0)

    return pl.BlockSpec((1, block, head_dim), index)


def keep_rows(x: Array, count) -> Array:
    """Zeros from row `count` on: what lies past the end of an array is anything, NaN too, and 0 * NaN is not 0."""
    return jnp.where(lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0) < count, x, 0)


def visible(bounds: Array, keys: Array, plan: Plan, axis: int) -> Array:
    """Bool [keys queries] from `Plan.bounds` (axis 0), or [queries keys] from its transpose (axis 1)."""
    pick = lambda i: lax.slice_in_dim(bounds, i, i + 1, axis=axis)
    seen = None
    for i in range(plan.intervals):
        inside = keys < pick(2 * i + 1)
        if i > 0 or not plan.from_zero:
            inside &= keys >= pick(2 * i)
        seen = inside if seen is None else seen | inside
    return seen


def key_bias(valid, sample, keys: Array, plan: Plan) -> Array:
    """0 where a key exists and -inf where not, like keys: what hides a key from all queries is one addition."""
    exists = keys < plan.own_start + plan.mask.m
    if plan.limited:
        inside = [(keys >= valid[sample, i, 0]) & (keys < valid[sample, i, 1]) for i in range(4)]
        exists = functools.reduce(lambda a, b: a | b, inside)
    return jnp.where(exists, 0.0, -jnp.inf)


def _kernel(*refs, plan: Plan, tiles: ForwardTiles, heads: int, scale: float, form: Form):
    refs = list(refs)
    take = lambda n, when=True: [refs.pop(0) for _ in range(n)] if when else [None] * n
    (steps,) = take(1)
    (valid,) = take(1, plan.limited)
    q_ref, k_ref, v_ref = take(3)
    old_k_ref, old_v_ref = take(2, plan.slots > 0)
    (bounds_ref,) = take(1, plan.intervals > 0)
    out_ref, lse_ref, values_t, acc, total = take(5)
    top, part, part_total, tile_top = take(4, form == "stale_max")
    either_k, either_v = take(2, plan.slots > 0)
    bh, i = pl.program_id(0), pl.program_id(1)
    sample = bh // heads
    step = steps[lax.rem(sample, steps.shape[0]), i]
    valid_row = lax.rem(sample, valid.shape[0]) if plan.limited else 0
    at = key_block(step)
    chunks = tiles.block_k // tiles.chunk

    @pl.when(step & FIRST != 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        total[...] = jnp.zeros_like(total)
        if form == "stale_max":
            top[...] = jnp.full_like(top, MASK_VALUE)

    def scores(k_ref, c, masked):
        """Log2 scores of one chunk of keys, -inf where hidden."""
        keys_of = k_ref[0, c * tiles.chunk : (c + 1) * tiles.chunk]
        if not masked:
            return dot(keys_of, q_ref[0], NT) * (scale * LOG2_E)
        offset = c * tiles.chunk
        keys_of = keep_rows(keys_of, left_in_array() - offset)
        s = dot(keys_of, q_ref[0], NT) * (scale * LOG2_E)
        keys = at * tiles.block_k + offset + lax.broadcasted_iota(jnp.int32, (tiles.chunk, 1), 0)
        if plan.limited or not plan.intervals:
            # Bounds of the mask end inside the array; where there are none, its end is to be found here.
            s += key_bias(valid, valid_row, keys, plan)
        return jnp.where(visible(bounds_ref[...], keys, plan, 0), s, -jnp.inf) if plan.intervals else s

    def left_in_array():
        end = plan.own_start + plan.mask.m
        return jnp.where(at < plan.context_blocks, plan.slots, end) - at * tiles.block_k

    def accumulate(k_ref, masked, into, into_total, offset=None, maximum=False):
        for c in range(chunks):
            s = scores(k_ref, c, masked)
            if maximum:
                high = s.reshape(tiles.chunk // 8, 8, tiles.block_q).max(0)
                tile_top[...] = high if c == 0 else jnp.maximum(tile_top[...], high)
            p = jnp.exp2(s if offset is None else s - offset)
            into_total[...] += p.reshape(tiles.chunk // 8, 8, tiles.block_q).sum(0)
            values = values_t[:, c * tiles.chunk : (c + 1) * tiles.chunk]
            into[...] += dot(values, p.astype(values.dtype), NN)

    def tile(k_ref, v_ref, masked):
        values = keep_rows(v_ref[0], left_in_array()) if masked else v_ref[0]
        values_t[...] = values.astype(jnp.float32).T.astype(values_t.dtype)
        if form == "fixed_max":
            accumulate(k_ref, masked, acc, total)
            return
        old = top[...]

        def attempt(offset, maximum):
            part[...] = jnp.zeros_like(part)
            part_total[...] = jnp.zeros_like(part_total)
            accumulate(k_ref, masked, part, part_total, offset, maximum)

        attempt(old, maximum=True)
        new = jnp.maximum(old, tile_top[...].max(0, keepdims=True))
        top[...] = new
        shrink = jnp.exp2(old - new)
        # Not `> JUMP`: queries past the end of the array may be NaN, and must not hide another's jump.
        jumped = jnp.logical_not(jnp.max(new - old) <= JUMP)

        @pl.when(jumped)
        def _():
            attempt(new, maximum=False)
            acc[...] = acc[...] * shrink + part[...]
            total[...] = total[...] * shrink + part_total[...]

        @pl.when(jnp.logical_not(jumped))
        def _():
            acc[...] = (acc[...] + part[...]) * shrink
            total[...] = (total[...] + part_total[...]) * shrink

    @pl.when((step & CLEAR != 0) & (at >= plan.context_blocks))
    def _():
        tile(k_ref, v_ref, masked=False)

    if plan.slots:

        @pl.when((step & CLEAR != 0) & (at < plan.context_blocks))
        def _():
            tile(old_k_ref, old_v_ref, masked=False)

    if plan.any_masked:

        @pl.when(step & MASKED != 0)
        def _():
            if not plan.slots:
                tile(k_ref, v_ref, masked=True)
                return
            own = at >= plan.context_blocks

            @pl.when(own)
            def _():
                either_k[...], either_v[...] = k_ref[...], v_ref[...]

            @pl.when(jnp.logical_not(own))
            def _():
                either_k[...], either_v[...] = old_k_ref[...], old_v_ref[...]

            tile(either_k, either_v, masked=True)

    @pl.when(step & LAST != 0)
    def _():
        sums = jnp.maximum(total[...].sum(0, keepdims=True), jnp.finfo(jnp.float32).tiny)
        out_ref[0] = (acc[...] / sums).T.astype(out_ref.dtype)
        lse_ref[0] = jnp.log2(sums) + (top[...] if form == "stale_max" else 0.0)


def flash_forward(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    mask: Mask,
    tiles: ForwardTiles,
    *,
    form: Form,
    context: Context | None = None,
    key_lengths: Int[Array, "b"] | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b n h k"], Float[Array, "b h n"]]:
    """Attention and its log-sum-exp (natural logarithm, of the scaled scores), computed by the kernel.

    Args:
      tiles: from `tiles.forward`.
      form: "fixed_max" needs scores in the range `flash_attention.fixed_max_is_safe` checks.
      context, key_lengths: as in `reference.attention`.
      interpret: runs the kernel in Python, on any backend.
    """
    b, n, h, d = q.shape
    limited = context is not None or key_lengths is not None
    keys = mask.m + (0 if context is None else context.slots)
    tables = b if key_lengths is not None else 1
    most = max(1, MOST_STEPS // (tables * -(-keys // tiles.block_k))) * tiles.block_q
    if n > most:  # their steps would not fit into scalar memory: some queries at a time
        parts = [
            flash_forward(
                q[:, start : start + most],
                k,
                v,
                mask.queries(start, min(start + most, n)),
                tiles,
                form=form,
                context=context,
                key_lengths=key_lengths,
                interpret=interpret,
            )
            for start in range(0, n, most)
        ]
        return jnp.concatenate([p[0] for p in parts], axis=1), jnp.concatenate([p[1] for p in parts], axis=2)
    plan = Plan(
        mask, tiles.block_q, tiles.block_k, "queries", 0 if context is None else context.slots, limited
    )
    dtype = q.dtype
    operands = [heads_last(x) for x in (q, k, v)]
    keys = lambda step: jnp.maximum(key_block(step) - plan.context_blocks, 0)
    specs = [
        block_spec(tiles.block_q, h, d, query_block),
        block_spec(tiles.block_k, h, d, keys),
        block_spec(tiles.block_k, h, d, keys),
    ]
    vmem = pltpu.VMEM
    scratch = [vmem((d, tiles.block_k), v.dtype), vmem((d, tiles.block_q), jnp.float32)]
    scratch += [vmem((8, tiles.block_q), jnp.float32)]
    if form == "stale_max":
        row = lambda sublanes: vmem((sublanes, tiles.block_q), jnp.float32)
        scratch += [row(1), row(d), row(8), row(8)]
    if limited:
        valid = plan.valid(b if key_lengths is not None else 1, context, key_lengths)
        prefetch = [plan.dynamic(valid), valid]
    else:
        prefetch = [jnp.asarray(plan.static())[None]]
    if context is not None:
        operands += [heads_last(context.keys), heads_last(context.values)]
        old = lambda step: jnp.minimum(key_block(step), plan.context_blocks - 1)
        specs += [block_spec(tiles.block_k, h, d, old)] * 2
        scratch += [vmem((1, tiles.block_k, d), k.dtype), vmem((1, tiles.block_k, d), v.dtype)]

    def row_index(bh, i, steps, *_):
        return 0, query_block(steps[lax.rem(bh // h, steps.shape[0]), i])

    if plan.intervals:
        operands.append(jnp.asarray(plan.bounds()))
        specs.append(pl.BlockSpec((8, tiles.block_q), row_index))
    out, lse = pl.pallas_call(
        functools.partial(_kernel, plan=plan, tiles=tiles, heads=h, scale=d**-0.5, form=form),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(b * h, prefetch[0].shape[1]),
            in_specs=specs,
            out_specs=[
                block_spec(tiles.block_q, h, d, query_block),
                pl.BlockSpec((1, 1, tiles.block_q), lambda bh, i, *s: (bh, *row_index(bh, i, *s))),
            ],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct(operands[0].shape, dtype),
            jax.ShapeDtypeStruct((b * h, 1, n), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem_limit
        ),
        interpret=interpret,
        name=f"flash_forward_{form}",
    )(*prefetch, *operands)
    return heads_apart(out, (b, n, h, d)), lse.reshape(b, h, n) / LOG2_E
