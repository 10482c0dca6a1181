"""The adversarial head over the features of a network on a mesh: the numbers of one device, and no gathered tokens."""

import jax
import numpy as np

from lingbot_jax.diffusion import distill
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.discriminator import Discriminator, DiscriminatorConfig
from lingbot_jax.parallel import sharding
from lingbot_jax.parallel.mesh import MeshConfig, make_mesh
from lingbot_jax.parallel.sequence import attention_kernel
from tests.models import worlds
from tests.parallel.eight.check_sharding import placed

HEAD = DiscriminatorConfig(depths=(0, 1), queries=2, width=16, heads=2)


def test_equals_one_device():
    model = worlds.make()
    head = worlds.random_model(lambda key: Discriminator(HEAD, worlds.CONFIG, key), seed=3)
    inputs = worlds.inputs()

    def loss(head, latents, model, rest, attend):
        _, features = model(latents, *rest, attend=attend, depths=HEAD.depths)
        own, _ = distill.discriminator_loss(head, features, features)
        return own + distill.adversarial_loss(head(features))

    slopes = jax.value_and_grad(loss, (0, 1))
    want = jax.jit(slopes, static_argnums=4)(head, inputs[0], model, inputs[1:], Attend())
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, seq=2), jax.devices()[:4])
    attend = Attend(kernel=attention_kernel(mesh, worlds.CONFIG.heads))
    latents, rest = jax.device_put((inputs[0], inputs[1:]), sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        program = jax.jit(slopes, static_argnums=4)
        got = program(placed(head, mesh), latents, placed(model, mesh), rest, attend)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
