"""Features by depth, and the adversarial head over them: what it sees, and where its gradients go."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.diffusion import distill
from lingbot_jax.models import params
from lingbot_jax.models.discriminator import Discriminator, DiscriminatorConfig
from lingbot_jax.models.dit import WorldDiT
from lingbot_jax.models.layers import unpatchify
from tests.models import worlds

DEPTHS = (1, 2)
CONFIG = dataclasses.replace(worlds.CONFIG, layers=4)
HEAD = DiscriminatorConfig(depths=DEPTHS, queries=2, width=16, heads=2)


@pytest.fixture(scope="module")
def model():
    return worlds.make(CONFIG)


@pytest.fixture(scope="module")
def head():
    return worlds.random_model(lambda key: Discriminator(HEAD, CONFIG, key), seed=3)


@functools.partial(jax.jit, static_argnames="depths")
def forward(model, latents, timestep, condition, depths=()):
    return model(latents, timestep, condition, depths=depths)


def test_features_are_the_outputs_of_the_named_blocks(model):
    """A network cut after a block, under the same output layer, gives the velocity of that block's output."""
    inputs = worlds.inputs(CONFIG)
    velocity, features = forward(model, *inputs, depths=DEPTHS)
    np.testing.assert_array_equal(velocity, forward(model, *inputs))
    assert features.shape == (2, worlds.BATCH, worlds.FRAMES, worlds.TOKENS, CONFIG.dim)
    for i, depth in enumerate(DEPTHS):
        arrays = params.arrays_of(model)
        cut = {k: v[: depth + 1] if k.startswith("blocks.") else v for k, v in arrays.items()}
        config = dataclasses.replace(CONFIG, layers=depth + 1)
        short = params.with_arrays(params.abstract(lambda key, c=config: WorldDiT(c, key)), cut)
        output = model.head(features[i], model.time(inputs[1][..., None])[0])
        expected = unpatchify(output, worlds.HEIGHT, worlds.WIDTH, CONFIG.patch)
        np.testing.assert_allclose(forward(short, *inputs), expected, rtol=1e-4, atol=1e-4)


def test_features_cost_their_own_memory_and_nothing_else():
    """Of 24 blocks two are kept, forward and backward; one place more is for the blocks that are not."""
    latents, timestep, condition = worlds.inputs(CONFIG)
    kept = (len(DEPTHS) + 1) * latents.size // latents.shape[-1] // 4 * CONFIG.dim * 4

    def cost(depths, remat, slope):
        config = dataclasses.replace(CONFIG, layers=24, remat=remat)
        model = params.abstract(lambda key: WorldDiT(config, key))

        def loss(latents, model):
            out = model(latents, timestep, condition, depths=depths)
            return sum(x.sum() for x in jax.tree.leaves(out))

        compiled = jax.jit(jax.grad(loss) if slope else loss).lower(latents, model).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"]

    for remat, slope in (("full", True), ("none", False)):
        (without, flops), (with_features, more) = (cost(d, remat, slope) for d in ((), DEPTHS))
        assert with_features - without < 1.5 * kept, (remat, slope)
        assert more < 1.01 * flops


def test_a_new_head_knows_nothing_and_a_drawn_one_sees_everything(model, head):
    _, features = forward(model, *worlds.inputs(CONFIG), depths=DEPTHS)
    made = jax.jit(lambda key: Discriminator(HEAD, CONFIG, key))(jax.random.key(0))
    assert (jax.jit(Discriminator.__call__)(made, features) == 0).all()
    slope = jax.jit(jax.grad(lambda f: head(f)[0]))(features)
    assert (jnp.abs(slope[:, 0]).max(-1) > 0).all(), "every token of every frame at every depth"
    assert (slope[:, 1] == 0).all(), "other videos"


def test_each_loss_reaches_what_it_trains(model, head):
    """The head's loss the head alone; the student's the student's samples."""
    latents, timestep, condition = worlds.inputs(CONFIG)
    noise, sigma = jnp.ones_like(latents), timestep / 1000

    def features(model, x):
        return model(distill.add_noise(x, noise, sigma), timestep, condition, depths=DEPTHS)[1]

    def head_loss(head, model, x):
        return distill.discriminator_loss(head, features(model, latents), features(model, x))[0]

    def student_loss(x, head, model):
        return distill.adversarial_loss(head(features(model, x)))

    def largest(tree):
        return {k: float(jnp.abs(v).max()) for k, v in params.arrays_of(tree).items()}

    to_head, to_model, to_x = jax.jit(jax.grad(head_loss, (0, 1, 2)))(head, model, 2 * latents)
    # Adding one number to all keys changes no softmax.
    assert {k for k, v in largest(to_head).items() if v < 1e-6} <= {"readouts.k.bias"}
    assert set(largest(to_model).values()) == {0.0} and (to_x == 0).all()
    to_x = jax.jit(jax.grad(student_loss))(latents, head, model)
    assert (jnp.abs(to_x).max((1, 2, 3, 4)) > 1e-6).all()


def test_its_config_is_checked():
    with pytest.raises(
        ConfigError, match=r"depths = \(2, 1\): must name at least one block, in rising order"
    ):
        DiscriminatorConfig(depths=(2, 1))
    with pytest.raises(ConfigError, match="heads = 3: must divide width = 16"):
        DiscriminatorConfig(width=16, heads=3)
    with pytest.raises(ConfigError, match=r"depths = \(1, 4\): the network has blocks 0..3"):
        DiscriminatorConfig(depths=(1, 4)).check(CONFIG)
