"""WorldDiT: equal results along its different ways, and what each way must not change or compute."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from kernels_pallas.context import Context, valid_slots
from kernels_pallas.flash_attention import flash_attention
from kernels_pallas.mask import Mask
from kernels_pallas.reference import attention
from lingbot_jax.config import ConfigError
from lingbot_jax.models import params, rope
from lingbot_jax.models.attention import Attend, attend_local
from lingbot_jax.models.control import is_adapter
from lingbot_jax.models.dit import WorldDiT
from lingbot_jax.models.layers import rematerialised, sinusoid
from tests.models import numpy_dit, worlds

CONFIG = worlds.CONFIG


@pytest.fixture(scope="module")
def model():
    return worlds.make()


@jax.jit
def forward(model, latents, timestep, condition, attend=None, positions=None):
    return model(latents, timestep, condition, attend=attend or Attend(), positions=positions)


@jax.jit
def forward_kv(model, latents, timestep, condition, attend, positions):
    return model(latents, timestep, condition, attend=attend, positions=positions, return_kv=True)


def test_precompute_gives_the_same_numbers(model):
    latents, timestep, condition = worlds.inputs()
    prepared = jax.jit(lambda m, c: m.precompute(c))(model, condition)
    expected = forward(model, latents, timestep, condition)
    np.testing.assert_allclose(forward(model, latents, timestep, prepared), expected, atol=2e-5)


def test_guidance_shares_all_but_the_text(model):
    latents, timestep, condition = worlds.inputs()
    other = dataclasses.replace(condition, text=jnp.zeros_like(condition.text))
    prepared = jax.jit(WorldDiT.precompute)(model, condition)
    unconditional = dataclasses.replace(prepared, text=jax.jit(WorldDiT.precompute_text)(model, other.text))
    expected = forward(model, latents, timestep, other)
    np.testing.assert_allclose(forward(model, latents, timestep, unconditional), expected, atol=2e-5)
    assert np.abs(expected - forward(model, latents, timestep, prepared)).max() > 1e-3

    def both(model, condition, text):
        first = model.precompute(condition)
        return first, dataclasses.replace(first, text=model.precompute_text(text))

    abstract = params.abstract(lambda key: WorldDiT(CONFIG, key))
    flops = lambda f, *args: jax.jit(f).lower(abstract, *args).cost_analysis()["flops"]
    text = flops(WorldDiT.precompute_text, other.text)
    shared = flops(both, condition, other.text)
    # The second branch costs its text and nothing else.
    assert shared == pytest.approx(flops(WorldDiT.precompute, condition) + text, rel=1e-6)


def plain(q, k, v, mask, context=None):
    """A kernel that gives gradients to everything, as published attention does."""
    flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
    return attention(flat(q), flat(k), flat(v), mask, context=context).reshape(q.shape)


def flash(q, k, v, mask, context=None):
    """The TPU's kernels, interpreted; heads of 64."""
    flat = [x.reshape(x.shape[0], -1, *x.shape[3:]).astype(jnp.bfloat16) for x in (q, k, v)]
    mask = Mask.full(flat[0].shape[1], flat[0].shape[1])
    return flash_attention(*flat, mask, context=context, generation="v6e", interpret=True).reshape(q.shape)


@pytest.mark.parametrize("kernel", [attend_local, plain, flash])
def test_no_gradient_goes_into_a_cache(kernel):
    q, keys, values = jax.random.normal(jax.random.key(0), (3, 1, 1, 4, 1, 64), jnp.bfloat16)

    def loss(q, keys, values):
        attend = Attend(context=Context(keys[None, 0], values[None, 0], valid_slots((0, 4))), kernel=kernel)
        out = attend(q, q, q, attend.context.layer(keys[0], values[0]))
        return jnp.square(out.astype(jnp.float32)).sum()

    dq, *gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, keys, values)
    assert jnp.abs(dq).max() > 1e-3
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


def test_a_tpu_is_never_left_without_kernels():
    mesh = AbstractMesh((1,), ("data",), abstract_device=AbstractDevice("TPU v5p", 2, platform="tpu"))
    x = jax.ShapeDtypeStruct((1, 2, 4, 2, 8), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ConfigError, match="plain attention on a TPU"):
        jax.eval_shape(attend_local, x, x, x)


def test_precompute_saves_its_flops():
    """At least the four camera products and the text keys and values of a layer, and the conditioning patch."""
    config = dataclasses.replace(CONFIG, dim=96, layers=1)
    model = params.abstract(lambda key: WorldDiT(config, key))
    latents, timestep, condition = worlds.inputs(config)
    prepared = jax.eval_shape(lambda m, c: m.precompute(c), model, condition)
    flops = [
        jax.jit(forward).lower(model, latents, timestep, c).cost_analysis()["flops"]
        for c in (condition, prepared)
    ]
    tokens = worlds.BATCH * worlds.FRAMES * worlds.TOKENS
    text = worlds.BATCH * config.text_len
    camera = 2 * tokens * 4 * config.dim**2
    text_kv = 2 * text * 2 * config.dim**2
    control = 2 * tokens * (4 * config.control_channels * config.dim + 2 * config.dim**2)
    given = 2 * tokens * 4 * (config.in_channels - config.latent_channels) * config.dim
    saved = camera + text_kv + control + given
    assert flops[0] - flops[1] >= saved
    assert flops[0] - flops[1] <= 1.1 * saved  # and nothing else is missing


def test_chunks_with_cached_context_equal_the_masked_forward(model):
    """Two chunks of three frames, the second with the first's keys and values in a ring with free slots."""
    latents, timestep, condition = worlds.inputs()
    chunk, n = 3, 3 * worlds.TOKENS
    mask = Mask.block_causal(2 * n, n)
    whole = forward(model, latents, timestep, condition, Attend(mask=mask))

    positions = jnp.arange(6)
    parts = [slice(0, chunk), slice(chunk, None)]
    first, second = [
        (latents[:, part], timestep[:, part], worlds.frames_of(condition, part)) for part in parts
    ]
    out, kv = forward_kv(model, *first, Attend(), positions[:chunk])
    np.testing.assert_allclose(out, whole[:, :chunk], atol=2e-5)

    grid = worlds.HEIGHT // 2, worlds.WIDTH // 2
    table = rope.rotary(positions[:chunk], *grid, CONFIG.head_dim, CONFIG.rope_theta)
    keys = rope.rotate(kv.keys, tuple(x.reshape(n, -1) for x in table))
    # The slots in a strange order with rubbish between: the spans say what is valid.
    rubbish = jnp.full_like(keys[:, :, :4], 1e3)
    ring = lambda x: jnp.concatenate([x[:, :, 10:], rubbish, x[:, :, :10]], 2)
    spans = valid_slots((0, n - 10), (n - 6, n + 4))
    context = Context(ring(keys), ring(kv.values), spans)
    out = forward(model, *second, Attend(context=context), positions[chunk:])
    np.testing.assert_allclose(out, whole[:, chunk:], atol=2e-5)


def test_positions_are_relative(model):
    """A shift of all positions changes nothing; a gap between frames does."""
    latents, timestep, condition = worlds.inputs()
    here = forward(model, latents, timestep, condition, None, jnp.arange(6))
    np.testing.assert_allclose(here, forward(model, latents, timestep, condition), atol=1e-6)
    shifted = forward(model, latents, timestep, condition, None, jnp.arange(6) + 40_000)
    np.testing.assert_allclose(here, shifted, atol=1e-4)  # float32 rounding of angles up to 40,000 positions
    gap = forward(model, latents, timestep, condition, None, jnp.arange(6) * 3)
    assert float(jnp.abs(gap - here).max()) > 1e-2


def test_causal_mask_hides_later_chunks(model):
    latents, timestep, condition = worlds.inputs()
    attend = Attend(mask=Mask.block_causal(6 * worlds.TOKENS, 3 * worlds.TOKENS))
    before = forward(model, latents, timestep, condition, attend)
    after = forward(model, latents.at[:, 3:].add(1.0), timestep, condition, attend)
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert float(jnp.abs(before[:, 3:] - after[:, 3:]).max()) > 1e-2


def test_timestep_a_token_equals_timestep_a_frame(model):
    latents, timestep, condition = worlds.inputs()
    tokens = jnp.repeat(timestep[..., None], worlds.TOKENS, axis=-1)
    expected = forward(model, latents, timestep, condition)
    np.testing.assert_allclose(forward(model, latents, tokens, condition), expected, atol=1e-5)


@pytest.mark.parametrize("policy", ["full", "offload"])
def test_remat_policies_keep_the_gradient(model, policy):
    latents, timestep, condition = worlds.inputs()
    expected = _gradient("none")(model.blocks, model, latents, timestep, condition)
    ours = _gradient(policy)(model.blocks, model, latents, timestep, condition)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()) + 1e-9)


@functools.cache
def _gradient(policy: str):
    config = dataclasses.replace(CONFIG, remat=policy)

    def loss(blocks, model, *inputs):
        model = worlds.with_config(model, config)
        model.blocks = blocks
        return jnp.square(model(*inputs)).mean()

    return jax.jit(jax.grad(loss))


def test_remat_policies_say_what_is_saved():
    """Numbers kept for the backward pass, by the stacked axis of 8 layers: block < dots < none."""
    latents, timestep, condition = worlds.inputs()
    kept = {}
    for policy in ("none", "dots", "full"):
        config = dataclasses.replace(CONFIG, remat=policy, layers=8)
        model = params.abstract(lambda key, config=config: WorldDiT(config, key))
        vjp = jax.eval_shape(lambda m: jax.vjp(lambda m: m(latents, timestep, condition), m)[1], model)
        kept[policy] = sum(x.size for x in jax.tree.leaves(vjp) if x.shape[:1] == (8,))
    weights = sum(x.size for x in jax.tree.leaves(model.blocks))
    tokens = 8 * worlds.BATCH * worlds.FRAMES * worlds.TOKENS
    assert kept["full"] <= weights + tokens * CONFIG.dim * 1.1
    assert kept["full"] < kept["dots"] < kept["none"]
    half = dataclasses.replace(CONFIG, remat="full", layers=8, dtype="bfloat16")
    model = params.abstract(lambda key: WorldDiT(half, key))
    vjp = jax.eval_shape(lambda m: jax.vjp(lambda m: m(latents, timestep, condition), m)[1], model)
    stream = (8, worlds.BATCH, worlds.FRAMES, worlds.TOKENS, CONFIG.dim)  # float32, and kept in half of it
    assert {x.dtype for x in jax.tree.leaves(vjp) if x.shape == stream} == {jnp.dtype("bfloat16")}


def test_rematerialisation_carries_no_rounding_on():
    """64 blocks that each add less than a rounding of bfloat16: none of it is lost, nor of the gradient."""
    run = rematerialised(lambda x, w: (x + w * x, None), "full", "bfloat16")
    x, w = jax.random.normal(jax.random.key(0), (100,)), jnp.full(64, 1e-3)
    y, vjp = jax.vjp(jax.jit(lambda x, w: jax.lax.scan(run, x, w)[0]), x, w)
    np.testing.assert_allclose(y, x * 1.001**64, rtol=3e-4)
    dx, dw = vjp(jnp.ones_like(x))
    np.testing.assert_allclose(dx, 1.001**64, rtol=1e-5)
    np.testing.assert_allclose(dw, x.sum() * 1.001**63, rtol=1e-2)


def test_untrained_adapters_change_nothing():
    latents, timestep, condition = worlds.inputs()
    made = jax.jit(lambda key: WorldDiT(CONFIG, key))(jax.random.key(0))
    fresh = {name: p for name, p in params.flat_params(made).items() if name.startswith("blocks.control")}
    model = worlds.make()
    for name, p in params.flat_params(model).items():
        if name in fresh:
            p[...] = fresh[name][...]
    with_control = forward(model, latents, timestep, condition)
    without = forward(model, latents, timestep, dataclasses.replace(condition, control=None))
    np.testing.assert_array_equal(with_control, without)
    # The velocity of a new model is zero, too.
    assert not np.asarray(forward(made, latents, timestep, condition)).any()


def test_adapters_are_the_embedding_and_the_injections():
    model = params.abstract(lambda key: WorldDiT(CONFIG, key))
    named = {name for name in params.flat_params(model) if is_adapter(name)}
    linears = ["control.mlp.up", "control.mlp.down", "blocks.control.mlp.up", "blocks.control.mlp.down"]
    linears += ["control.patch", "blocks.control.scale", "blocks.control.shift"]
    assert named == {f"{name}.{part}" for name in linears for part in ("kernel", "bias")}


def test_bfloat16_rounds_as_published_and_keeps_float32_where_promised(model):
    latents, timestep, condition = worlds.inputs()
    model = jax.tree.map(lambda p: jax.lax.reduce_precision(p, 8, 7), model)  # only arithmetic is to differ
    half = worlds.with_config(model, dataclasses.replace(CONFIG, dtype="bfloat16"))
    sample, error = worlds.sample_of(model), {}
    exact, rounded = (numpy_dit.velocity(sample, rounded) for rounded in (False, True))
    for name, net in (("float32", model), ("bfloat16", half)):
        ours = forward(net, latents, timestep, condition)
        assert ours.dtype == jnp.float32
        error[name] = numpy_dit.relative(np.asarray(ours[0]), exact)
    assert error["float32"] < 2e-6
    assert 0.5 < error["bfloat16"] / numpy_dit.relative(rounded, exact) < 2
    lowered = jax.jit(
        lambda m, *inputs: m(*inputs, attend=Attend(kernel=lambda q, k, v, mask: v), return_kv=True)
    )
    lowered = lowered.trace(half, latents, timestep, condition).lower(lowering_platforms=("tpu",))
    products = [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]
    # In float32: two of the time MLP, its projection, the head. All others take bfloat16 (equal ones are one function).
    wide = [line for line in products if re.search(r": \(tensor<\S*f32>", line)]
    assert len(wide) == 4 and len(products) > 20
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in wide)
    velocity, kv = lowered.out_info
    assert (velocity.dtype, kv.keys.dtype) == (jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize("stream", ["float32", "bfloat16"])
def test_the_residual_stream_has_its_dtype(model, stream):
    """What the scan over the blocks carries, and what rematerialisation keeps of each."""
    half = worlds.with_config(model, dataclasses.replace(CONFIG, dtype="bfloat16", residual_dtype=stream))
    program = jax.make_jaxpr(lambda *inputs: half(*inputs))(*worlds.inputs())
    (scan,) = [e for e in program.eqns if e.primitive.name == "scan"]
    shape = (worlds.BATCH, worlds.FRAMES, worlds.TOKENS, CONFIG.dim)
    assert [v.aval.dtype for v in scan.outvars if v.aval.shape == shape] == [jnp.dtype(stream)]


def test_angles_are_those_of_float64():
    frequencies = np.power(10000.0, -np.arange(22) / 22)
    position = np.array([0, 1, 240, 1023, 1024, 40_001, 65_535])
    cos, sin = jax.jit(lambda p: rope.cos_sin(p, frequencies))(jnp.asarray(position))
    angle = np.outer(position, frequencies)
    np.testing.assert_allclose(cos, np.cos(angle), atol=2e-7)
    np.testing.assert_allclose(sin, np.sin(angle), atol=2e-7)

    timestep = np.array([0, 0.25, 399, 833.3333, 937.5, 999.99, 1000], np.float32)
    angle = np.outer(timestep.astype(np.float64), np.power(10000.0, -np.arange(128) / 128))
    expected = np.concatenate([np.cos(angle), np.sin(angle)], 1)
    np.testing.assert_allclose(sinusoid(jnp.asarray(timestep), 256), expected, atol=3e-7)


def test_rotation_in_our_order_is_the_published_one():
    """Neighbouring pairs as complex numbers, in float64."""
    rng = np.random.default_rng(0)
    k, positions = 14, np.array([3, 5])
    assert rope.axis_sizes(128) == (44, 42, 42) and rope.axis_sizes(k) == (6, 4, 4)
    x = rng.normal(size=(1, 2, 6, 2, k))  # published order
    t, h, w = np.meshgrid(positions, np.arange(2), np.arange(3), indexing="ij")
    angles = []
    for index, size in zip((t, h, w), rope.axis_sizes(k), strict=True):
        angles.append(index.reshape(2, 6, 1) * 10000.0 ** (-np.arange(0, size, 2) / size))
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * np.concatenate(angles, -1))[None, :, :, None]
    expected = np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    ours = jnp.asarray(np.concatenate([x[..., ::2], x[..., 1::2]], -1), jnp.float32)
    table = rope.rotary(jnp.asarray(positions), 2, 3, k, 10000.0)
    np.testing.assert_allclose(rope.interleave(rope.rotate(ours, table)), expected, atol=1e-6)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(image=None), "condition.image = None: must be given exactly if model.image_condition"),
        (dict(text=jnp.zeros((2, 5, 13))), "condition.text channels = 13: must be 12"),
        (dict(control=jnp.zeros((2, 6, 4, 6, 25))), "condition.control channels = 25: must be 24"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(change, said):
    latents, timestep, condition = worlds.inputs()
    model = params.abstract(lambda key: WorldDiT(CONFIG, key))
    with pytest.raises(ConfigError, match=said):
        jax.eval_shape(forward, model, latents, timestep, dataclasses.replace(condition, **change))


def test_latents_that_do_not_fit_are_refused():
    latents, timestep, condition = worlds.inputs()
    model = params.abstract(lambda key: WorldDiT(CONFIG, key))
    with pytest.raises(ConfigError, match="latents width = 5: must be a multiple of the patch, 2"):
        jax.eval_shape(forward, model, latents[:, :, :, :5], timestep, condition)
    with pytest.raises(ConfigError, match="latents channels = 3: must be 4"):
        jax.eval_shape(forward, model, latents[..., :3], timestep, condition)
    uncontrolled = params.abstract(lambda key: WorldDiT(dataclasses.replace(CONFIG, control="none"), key))
    with pytest.raises(ConfigError, match="condition.control = 'given': must be None"):
        jax.eval_shape(forward, uncontrolled, latents, timestep, condition)
