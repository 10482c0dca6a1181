"""The student's loss and gradient of stage `distill` on a mesh: rollout, samples and numbers of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lingbot_jax.models import params
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.discriminator import Discriminator
from lingbot_jax.parallel import sharding
from lingbot_jax.parallel.mesh import MeshConfig, make_mesh
from lingbot_jax.parallel.sequence import attention_kernel
from lingbot_jax.training.objectives import Constants
from lingbot_jax.training.objectives.distill import student_loss
from tests.parallel.eight.check_sharding import placed
from tests.rollout.worlds import TINY, codec, network
from tests.training import micro
from tests.training.test_distill import CAUSAL, KEY, clips, distill_config


def test_equals_one_device():
    config = distill_config(micro.ROOT, "unused", init="unused")
    config = dataclasses.replace(config, world=dataclasses.replace(config.world, causal=CAUSAL))
    template = params.abstract(lambda key: Discriminator(config.distill.head, TINY, key))
    rng, shapes = np.random.default_rng(0), params.arrays_of(template)
    head = params.with_arrays(template, {p: jnp.float32(rng.normal(size=a.shape)) for p, a in shapes.items()})
    networks = {name: network(TINY, seed) for seed, name in enumerate(("world", "real_low", "fake_low"))}
    networks["head"] = head
    constants = Constants(jnp.zeros((1, TINY.text_len, TINY.text_dim)), codec())

    def loss(student, networks, given, attend):
        networks = networks | {"world": student}
        found, metrics = student_loss(config, "low", networks, given, constants, KEY, attend)
        return found, metrics["chunks"].sum

    slopes = jax.value_and_grad(loss, has_aux=True)
    want = jax.jit(slopes, static_argnums=3)(networks["world"], networks, clips(), Attend())
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, seq=2), jax.devices()[:4])
    attend = Attend(kernel=attention_kernel(mesh, TINY.heads))
    given = jax.device_put(clips(), sharding.batch_sharding(mesh))
    on_mesh = {name: placed(module, mesh) for name, module in networks.items()}
    with jax.set_mesh(mesh):
        got = jax.jit(slopes, static_argnums=3)(on_mesh["world"], on_mesh, given, attend)
    assert got[0][1] == want[0][1]
    np.testing.assert_allclose(got[0][0], want[0][0], rtol=1e-4)
    for (path, a), b in zip(
        params.arrays_of(got[1]).items(), params.arrays_of(want[1]).values(), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3 * np.abs(b).max(), err_msg=path)
