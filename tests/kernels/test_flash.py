"""The Pallas kernels in interpret mode against float64 NumPy: shapes, masks, gradients, hostile inputs."""

import functools
from unittest import mock

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from kernels_pallas.cached_attention import cached_attention
from kernels_pallas.context import Context, valid_slots
from kernels_pallas.flash_attention import SCORE_LOG2, fixed_max_is_safe, flash_attention
from kernels_pallas.flash_backward import with_offset
from kernels_pallas.flash_forward import JUMP, LOG2_E, STALE_MAX_VALUE_LOG2, flash_forward
from kernels_pallas.mask import Mask
from kernels_pallas.steps import CLEAR, MASKED, Plan, key_block, query_block
from kernels_pallas.tiles import BackwardTiles, ForwardTiles, Tiles
from tests.kernels import numpy_reference

pytestmark = pytest.mark.long

BF16 = jnp.bfloat16


def tiles(form: str, accumulator: int = 1 << 24) -> Tiles:
    forward = ForwardTiles(128, 256, 128)
    backward = BackwardTiles(128 if form == "rows" else 256, 256, 128, form, accumulator)
    return Tiles(forward, forward, backward)


def normal(key, *shape):
    return jax.random.normal(jax.random.key(key), shape).astype(BF16)


def check(got, q, k, v, seen, g, names=("out", "dq", "dk", "dv")):
    exact = numpy_reference.attention(q, k, v, seen, g)
    limits = numpy_reference.bound(q, k, v, exact)
    for name, x, want, limit in zip(names, got, exact, limits, strict=False):
        error = np.abs(np.asarray(x, np.float64) - want).max()
        assert error <= limit, f"{name}: error {error:.3g} above the bound {limit:.3g}"


@hypothesis.given(
    form=st.sampled_from(["rows", "columns"]),
    head_dim=st.sampled_from([64, 128]),
    n=st.integers(40, 400),
    chunk=st.integers(30, 300),
    kind=st.sampled_from(["full", "causal", "window", "lengths"]),
    segments=st.booleans(),
)
@hypothesis.settings(max_examples=2, deadline=None, derandomize=True)
@hypothesis.example(form="rows", head_dim=64, n=333, chunk=150, kind="lengths", segments=True)
@hypothesis.example(form="columns", head_dim=128, n=300, chunk=100, kind="window", segments=False)
@hypothesis.example(form="columns", head_dim=64, n=40, chunk=30, kind="full", segments=False)
def test_equals_float64(form, head_dim, n, chunk, kind, segments):
    """Random lengths, chunks and windows, none a multiple of a tile; forward and gradients."""
    batch, lengths = (2, jnp.array([n // 3, n])) if kind == "lengths" else (1, None)
    mask = {
        "full": Mask.full(n, n),
        "lengths": Mask.full(n, n),
        "causal": Mask.block_causal(n, chunk),
        "window": Mask.block_causal(n, chunk, 2 * chunk + 20, 20),
    }[kind]
    q, k, v, g = (normal(i, batch, n, 1, head_dim) for i in range(4))

    @jax.jit
    def run(q, k, v, g, lengths):
        attend = functools.partial(
            flash_attention,
            mask=mask,
            generation="v6e",
            key_lengths=lengths,
            tiles=tiles(form, 1 if segments else 1 << 24),
            interpret=True,
        )
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(g)

    seen = np.repeat(mask.dense()[None], batch, 0)
    if lengths is not None:
        seen &= np.arange(n) < np.asarray(lengths)[:, None, None]
    with mock.patch("kernels_pallas.flash_forward.MOST_STEPS", 2 if segments else 1 << 17):
        got = run(q, k, v, g, lengths)
    check(got, q, k, v, seen, g)


def test_cached_equals_float64():
    """Valid slots are data: one compilation, several fillings; gradients of the chunk's own, none of the context."""
    n, slots = 150, 600
    q, k, v, g = (normal(i, 1, n, 1, 64) for i in range(4))
    keys, values = normal(4, 1, slots, 1, 64), normal(5, 1, slots, 1, 64)

    @jax.jit
    def run(q, k, v, g, keys, values, valid):
        attend = lambda q, k, v, keys, values: cached_attention(
            q,
            k,
            v,
            Context(keys, values, valid),
            generation="v6e",
            tiles=tiles("columns"),
            interpret=True,
        )
        out, vjp = jax.vjp(attend, q, k, v, keys, values)
        return out, *vjp(g)

    for intervals in ([], [(0, 70), (550, 600), (200, 300)], [(0, 600)]):
        hidden = np.ones(slots, bool)
        for start, stop in intervals:
            hidden[start:stop] = False
        # What is not valid may be anything finite.
        wild = [jnp.where(hidden[:, None, None], jnp.asarray(1e4, BF16), x) for x in (keys, values)]
        out, dq, dk, dv, *of_context = run(q, k, v, g, *wild, valid_slots(*intervals))
        assert not any(np.asarray(x, np.float32).any() for x in of_context)
        both = [jnp.concatenate([old, new], axis=1) for old, new in ((keys, k), (values, v))]
        seen = np.concatenate([np.repeat(~hidden[None], n, 0), np.ones((n, n), bool)], axis=1)[None]
        exact = numpy_reference.attention(q, *both, seen, g)
        exact = exact[0], exact[1], exact[2][:, slots:], exact[3][:, slots:]
        for x, want, limit in zip(
            (out, dq, dk, dv), exact, numpy_reference.bound(q, *both, exact), strict=True
        ):
            assert np.abs(np.asarray(x, np.float64) - want).max() <= limit


def test_context_with_mask_and_lengths():
    """All at once, in segments of queries, where dq of the context and of the chunk nearly cancel.

    Keys share a large component, which no softmax sees; the context's values have one sign and the chunk's the other.
    Rounded to bfloat16 before they are added, the two parts of dq would be wrong by more than the bound.
    """
    n, slots, lengths = 150, 130, jnp.array([90, 150])
    mask, valid = Mask.block_causal(n, 60), [(0, 40), (60, 120)]
    q, k, v, g = (normal(i, 2, n, 1, 64) for i in range(4))
    keys, values = normal(4, 2, slots, 1, 64), normal(5, 2, slots, 1, 64)
    k, keys, v, values, g = k + 4, keys + 4, v - 2, values + 2, g + 1

    @jax.jit
    def run(q, k, v, g, keys, values, lengths):
        attend = functools.partial(
            flash_attention,
            mask=mask,
            generation="v6e",
            context=Context(keys, values, valid_slots(*valid)),
            key_lengths=lengths,
            tiles=tiles("rows", 1),
            interpret=True,
        )
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(g)

    got = run(q, k, v, g, keys, values, lengths)
    filled = np.zeros((2, n, slots), bool)
    for start, stop in valid:
        filled[:, :, start:stop] = True
    own = mask.dense() & (np.arange(n) < np.asarray(lengths)[:, None, None])
    both = [jnp.concatenate([old, new], axis=1) for old, new in ((keys, k), (values, v))]
    exact = numpy_reference.attention(q, *both, np.concatenate([filled, own], axis=2), g)
    exact = (*exact[:2], *(x[:, slots:] for x in exact[2:]))
    limits = numpy_reference.bound(q, *both, exact)
    for name, x, want, limit in zip(("out", "dq", "dk", "dv"), got, exact, limits, strict=True):
        error = np.abs(np.asarray(x, np.float64) - want).max()
        assert error <= limit, f"{name}: error {error:.3g} above the bound {limit:.3g}"


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


@pytest.mark.parametrize("form", ["rows", "columns"])
def test_context_takes_three_products_of_five(form):
    """Of the traced kernels the one that reads the slots has dq's products and one output, the other all five."""
    n, slots = 300, 600
    own, old = (jax.ShapeDtypeStruct((1, m, 1, 128), BF16) for m in (n, slots))

    def gradients(q, k, v, g, keys, values):
        context = Context(keys, values, valid_slots((0, 70)))
        attend = functools.partial(
            cached_attention, context=context, generation="v6e", tiles=tiles(form), interpret=True
        )
        return jax.vjp(attend, q, k, v)[1](g)

    found = {}
    for equation in _equations(jax.make_jaxpr(gradients)(own, own, own, own, old, old).jaxpr):
        if equation.primitive.name == "pallas_call" and "backward" in (name := str(equation.params["name"])):
            products = sum(e.primitive.name == "dot_general" for e in _equations(equation.params["jaxpr"]))
            reads = any(x.aval.shape[1:2] == (slots,) for x in equation.invars)
            found[name] = products, reads, len(equation.outvars)
    # Unmasked and masked variant of the tile, two chunks each.
    assert found == {
        f"flash_backward_{form}": (4 * 5, False, 3),
        f"flash_backward_dq_{form}": (4 * 3, True, 1),
    }


def hostile():
    """name -> (q, k, v) of 100 queries, less than a block, and 640 keys, more than two."""
    q, k, v = normal(0, 1, 100, 1, 64), normal(1, 1, 640, 1, 64), normal(2, 1, 640, 1, 64)
    ones = jnp.ones((1, 100, 1, 64), BF16)
    late = jnp.arange(640)[None, :, None, None]
    yield "a jump of 10^4 in the last tile", (ones, jnp.where(late < 600, k, 1250.0).astype(BF16), v)
    yield "a fall of 10^4 after the first", (ones, jnp.where(late < 20, 1250.0, k).astype(BF16), v)
    yield "one huge key", (q, jnp.where(late == 300, 3e4, k).astype(BF16), v)
    yield "identical keys", (50 * q, jnp.broadcast_to(k[:, :1], k.shape), v)
    yield "very negative scores", (ones, jnp.full_like(k, -1000.0), v)
    yield "tiny values", (q, k, v * 1e-20)
    yield "ordinary", (q, k, v)


@pytest.fixture(scope="module", params=["rows", "columns"])
def attend(request):
    @jax.jit
    def run(q, k, v, lengths, g):
        f = functools.partial(
            flash_attention, generation="v6e", tiles=tiles(request.param), key_lengths=lengths, interpret=True
        )
        out, vjp = jax.vjp(f, q, k, v)
        return fixed_max_is_safe(q, k, v), out, *vjp(g)

    return run


@pytest.mark.parametrize("length", [640, 1, 0])
def test_hostile_inputs(attend, length):
    """Never NaN or infinite, and within the bound; all keys but one masked, and all."""
    g = normal(3, 1, 100, 1, 64)
    for name, (q, k, v) in hostile():
        safe, *got = attend(q, k, v, jnp.array([length]), g)
        assert bool(safe) == (name == "ordinary"), name
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in got), name
        seen = np.broadcast_to(np.arange(640) < length, (1, 100, 640))
        exact = numpy_reference.attention(q, k, v, seen, g)
        error = np.abs(np.asarray(got[0], np.float64) - exact[0]).max()
        assert error <= numpy_reference.bound(q, k, v, exact)[0], (name, error)


@pytest.mark.parametrize("sign", [1, -1])
def test_fixed_max_form_holds_to_its_limit(sign):
    """Scores at the very edge of what `fixed_max_is_safe` lets through, of either sign, are still within the bound."""
    size = SCORE_LOG2 / LOG2_E * 64**0.5 / 64 * 0.99  # per channel: q of ones, k of this
    q = jnp.ones((1, 128, 1, 64), BF16)
    # All keys alike, so the exponentials keep their size through the sum, and one value stands out.
    k = jnp.full((1, 512, 1, 64), sign * size, BF16)
    v = normal(2, 1, 512, 1, 64)
    assert fixed_max_is_safe(q, k, v) and not fixed_max_is_safe(q, 1.1 * k, v)
    run = lambda *x: flash_forward(
        *x, Mask.full(128, 512), ForwardTiles(128, 256, 128), form="fixed_max", interpret=True
    )
    out, lse = jax.jit(run)(q, k, v)
    seen = np.ones((1, 128, 512), bool)
    exact = numpy_reference.attention(q, k, v, seen, jnp.zeros_like(q))
    assert np.abs(np.asarray(out, np.float64) - exact[0]).max() <= numpy_reference.bound(q, k, v, exact)[0]
    score = float(np.asarray(k, np.float64)[0, 0, 0, 0]) * 8
    np.testing.assert_allclose(lse, score + np.log(512), rtol=1e-5)


@pytest.mark.parametrize("excess", [0, 3])
def test_stale_max_form_holds_to_its_limit(excess):
    """A whole tile just below JUMP, with the largest values its range allows; eight times those overflow."""
    first = jnp.arange(2048)[None, :, None, None] < 1024
    q = jnp.ones((1, 128, 1, 64), BF16)
    # Scores in log2 are 64 k log2(e) / 8: zero in the first tile, one rounding below JUMP in the second.
    k = jnp.where(first, 0, 0.996 * JUMP / LOG2_E / 8).astype(BF16) * jnp.ones((1, 1, 1, 64), BF16)
    v = jnp.where(first, 1.0, 2.0 ** (STALE_MAX_VALUE_LOG2 + excess)).astype(BF16) * jnp.ones_like(k)
    run = lambda *x: flash_forward(
        *x, Mask.full(128, 2048), ForwardTiles(128, 1024, 512), form="stale_max", interpret=True
    )
    out, _ = jax.jit(run)(q, k, v)
    jump = float(np.asarray(k, np.float64).max()) * 8 * LOG2_E
    assert JUMP - 1 < jump < JUMP
    if excess:
        assert not np.isfinite(np.asarray(out, np.float64)).any()
        return
    exact = numpy_reference.attention(q, k, v, np.ones((1, 128, 2048), bool), jnp.zeros_like(q))
    error = np.abs(np.asarray(out, np.float64) - exact[0]).max()
    assert error <= numpy_reference.bound(q, k, v, exact)[0]


def test_rms_normed_inputs_take_the_fixed_max_form():
    """RMS-normed q and k with scales up to 2.2 each at head_dim 128 (a b = 4.84) are proved safe, larger ones not."""
    unit = lambda key: (lambda x: x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True)))(
        jax.random.normal(jax.random.key(key), (1, 64, 2, 128))
    )
    q, k, v = unit(0), unit(1), unit(2).astype(BF16)
    assert fixed_max_is_safe((2.2 * q).astype(BF16), (2.2 * k).astype(BF16), v)
    assert not fixed_max_is_safe((2.3 * q).astype(BF16), (2.3 * k).astype(BF16), v)
    assert not fixed_max_is_safe(q.at[0, 0, 0, 0].set(jnp.nan).astype(BF16), k.astype(BF16), v)
    # Each head by itself: a large q meets the small k of its own head only, and each head's values have the range.
    q, k = q[:, :, [0, 0]] * jnp.array([[4.0], [1.0]]), k[:, :, [0, 0]] * jnp.array([[1.0], [4.0]])
    assert fixed_max_is_safe(q.astype(BF16), k.astype(BF16), v)
    assert not fixed_max_is_safe(q.astype(BF16), k[:, :, ::-1].astype(BF16), v)
    assert not fixed_max_is_safe(q.astype(BF16), k.astype(BF16), v.at[:, :, 1].mul(2.0**-30))


def test_offset_channels_hold_a_float32():
    """Three bfloat16 channels add up to the offset, exactly, and the rest of the register is zeros."""
    offset = 1e4 * jax.random.normal(jax.random.key(0), (1, 2, 64))
    x = normal(1, 1, 64, 2, 128)
    wide = jax.jit(with_offset)(x, offset)
    assert wide.shape == (1, 64, 2, 256) and not np.asarray(wide[..., 131:], np.float32).any()
    total = np.asarray(wide[..., 128:131], np.float64).sum(-1)
    np.testing.assert_array_equal(total.swapaxes(1, 2), np.asarray(offset, np.float64))


def test_hidden_tiles_are_no_steps():
    """The grid has one step a visible tile, exactly those the dense mask says."""
    mask = Mask.block_causal(1000, 170, 510, 40)
    plan = Plan(mask, 128, 256)
    steps = plan.static()
    seen = np.zeros((8, 4), int)
    seen[query_block(steps), key_block(steps)] = np.where(steps & CLEAR, 2, np.where(steps & MASKED, 1, 0))
    dense = np.pad(mask.dense(), ((0, 24), (0, 24)))
    tile = dense.reshape(8, 128, 4, 256).swapaxes(1, 2)
    np.testing.assert_array_equal(seen > 0, tile.any((2, 3)))
    np.testing.assert_array_equal(seen[:7] == 2, tile.all((2, 3))[:7])
    assert len(steps) == (seen > 0).sum()


def test_invalid_tiles_load_nothing():
    """A step without a valid key computes nothing and names the key block loaded before it."""
    plan = Plan(Mask.full(128, 128), 128, 128, slots=1280, limited=True)
    context = Context(*(jnp.zeros((1, 1280, 1, 64)),) * 2, valid_slots((0, 200), (1000, 1024)))
    steps = np.asarray(plan.dynamic(plan.valid(1, context, None)))[0]
    kinds = steps & (CLEAR | MASKED)
    np.testing.assert_array_equal(kinds, [CLEAR, MASKED, 0, 0, 0, 0, 0, MASKED, 0, 0, CLEAR])
    np.testing.assert_array_equal(key_block(steps), [0, 1, 1, 1, 1, 1, 1, 7, 7, 7, 10])


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((1, 8, 2, 64), (1, 8, 1, 64)), "must agree"),
        (((1, 8, 2, 32), (1, 8, 2, 32)), "head_dim = 32"),
        (((1, 8, 2, 64), (1, 9, 2, 64)), "mask of 8 x 8"),
    ],
)
def test_refusals(shapes, words):
    q, k = (jnp.zeros(s, BF16) for s in shapes)
    with pytest.raises(ValueError, match=words):
        flash_attention(q, k, k, Mask.full(8, 8), generation="v6e", interpret=True)
