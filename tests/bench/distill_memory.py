"""Compiled peak of the student's step of stage `distill` at 7, 28 and 112 chunks of rollout and a fixed K.

    python -m tests.bench distill_memory

Nothing runs: the step of a model whose parameters outweigh its latents is compiled for this machine. The last line of
stdout is one JSON object: `peak_bytes` by chunks, and `ratio` of the largest to the smallest.
"""

import json

import jax

from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.discriminator import DiscriminatorConfig
from lingbot_jax.parallel import sharding
from lingbot_jax.parallel.mesh import make_mesh
from lingbot_jax.training.config import TaskConfig, TrainConfig
from lingbot_jax.training.post_training import DistillConfig
from lingbot_jax.training.start import objective_of
from lingbot_jax.training.step import Program, encode_program, make_step, networks_of
from lingbot_jax.worlds.config import CausalConfig
from tests.training import micro

CHUNKS = (7, 28, 112)
NETWORK = DiTConfig(
    dim=512,
    layers=4,
    heads=4,
    ffn=2048,
    freq_dim=64,
    text_dim=64,
    text_len=16,
    latent_channels=8,
    control="cam_act",
    dtype="float32",
    remat="full",
)


def config(chunks: int, gradient: str = "cache") -> TrainConfig:
    """A run whose rollouts have up to `chunks` chunks of one latent frame; the gradient goes through the last 3."""
    causal = CausalConfig(
        chunk=1, window=6, sink=1, schedule="warped", levels=(1000, 750, 500, 250), shift=5.0
    )
    head = DiscriminatorConfig(depths=(1, 3), width=128, heads=4)
    return micro.config(
        micro.ROOT,
        "unused",
        stage="distill",
        init="unused",
        world=micro.world_config(network=NETWORK, sample=None, causal=causal),
        teachers={"high": NETWORK, "low": NETWORK},
        data=micro.DataConfig(path="unused", frames=4 * chunks - 3, batch=1),
        tasks=TaskConfig(continuation=0.0),
        distill=DistillConfig(shortest=5, window=5, gradient_chunks=3, gradient=gradient, head=head),
        size=(32, 32),
        curriculum=(),
    )


def student_step(config: TrainConfig, devices: list[jax.Device]) -> Program:
    """The step that updates the student, and with it the critic, for these devices; arguments are abstract."""
    mesh, objective = make_mesh(config.mesh, devices), objective_of(config)
    encode = encode_program(config, mesh)
    with jax.set_mesh(mesh):
        encoded = jax.eval_shape(encode.fn, *encode.args)
    placed = jax.tree.map(lambda _: sharding.batch_sharding(mesh), encoded)
    updates = objective.updates(0)
    assert "world" in networks_of(updates[1:])
    # The critic has a step of its own; here the student's update is what is looked at.
    return make_step(objective, config, mesh, updates[1:], sharding.specs(encoded, placed))


def peak_bytes(config: TrainConfig, devices: list[jax.Device]) -> int:
    memory = student_step(config, devices).lower().compile().memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes


def main(arguments: list[str]) -> None:
    if arguments:
        raise SystemExit("bench: distill_memory takes no arguments")
    found = {}
    for chunks in CHUNKS:
        found[chunks] = peak_bytes(config(chunks), jax.devices()[:1])
        print(f"{chunks} chunks: {found[chunks] / 1e6:.1f} MB", flush=True)
    print(json.dumps({"peak_bytes": found, "ratio": max(found.values()) / min(found.values())}), flush=True)
