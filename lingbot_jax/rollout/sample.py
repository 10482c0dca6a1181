"""Bidirectional sampling: a whole clip from noise, image-to-video or continuing conditioning frames.

All denoising steps are one compiled program. The steps of the high-noise expert come first and those of the
low-noise expert follow, at a place known when tracing, so each expert is a `lax.scan` of its own: nothing is
routed at run time. What does not depend on the noise level is computed once per expert, before its scan.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from lingbot_jax.config import ConfigError, require
from lingbot_jax.diffusion import guidance, solvers
from lingbot_jax.diffusion.flow import TIMESTEPS
from lingbot_jax.models.attention import Attend
from lingbot_jax.models.codec import Codec
from lingbot_jax.models.dit import Condition, WorldDiT
from lingbot_jax.parallel import multihost
from lingbot_jax.parallel.mesh import BATCH_AXES
from lingbot_jax.worlds.clips import Clips, Encoded, encode_condition
from lingbot_jax.worlds.condition import make_condition
from lingbot_jax.worlds.config import EXPERTS, SampleConfig, WorldConfig
from lingbot_jax.worlds.world import World

Latents = Float[Array, "b t h w c"]


def draw_noise(seed: int | Integer[Array, ""], indices: Int[Array, "b"], shape: tuple[int, ...]) -> Latents:
    """Start noise, one key per sample: sample i is the same in every batch it is part of."""
    key = jax.random.key(seed)
    draw = lambda i: jax.random.normal(jax.random.fold_in(key, i), shape)
    return jax.vmap(draw)(indices)


def denoise(
    networks: Mapping[str, WorldDiT],
    boundary: float,
    noise: Latents,
    condition: Condition,
    negative: Float[Array, "b l d"] | None,
    config: SampleConfig,
    attend: Attend = Attend(),  # noqa: B008 - frozen
    on_step: Callable[[], None] | None = None,
) -> Latents:
    """Integrates the flow from noise to clean latents. Pure; trace it inside one jit.

    Args:
      networks: one, or the experts `high` and `low`, whose steps meet at `boundary` (a noise level).
      condition: what to generate. negative: text tokens of the unconditional branch, which shares all else; None
        exactly when no scale differs from 1. on_step: called on the host at every step, e.g. by a progress bar.
    """
    require(
        (negative is not None) == config.guidance.guided,
        "guidance",
        config.guidance,
        "an unconditional branch is needed exactly when a scale is not 1",
    )
    table = solvers.make(config.solver, config.steps, config.shift)
    parts = [(next(iter(networks.values())), table, config.guidance.low)]
    if len(networks) > 1:
        switch = int(np.sum(table.timestep >= boundary * TIMESTEPS))  # timesteps fall
        parts = [
            (networks["high"], table.rows(0, switch), config.guidance.high),
            (networks["low"], table.rows(switch, config.steps), config.guidance.low),
        ]
    state = solvers.start(noise)
    for network, rows, scale in parts:
        if not len(rows.sigma):
            continue
        if scale != 1.0 and config.guidance.batched:
            both = guidance.double(condition, dataclasses.replace(condition, text=negative))
            prepared = (network.precompute(both),)
        else:
            prepared = (network.precompute(condition),)
            if scale != 1.0:
                prepared += (dataclasses.replace(*prepared, text=network.precompute_text(negative)),)

        def velocity(x, timestep, network=network, prepared=prepared, scale=scale):
            if on_step is not None:
                jax.debug.callback(on_step)

            def predict(latents, p):
                return network(latents, jnp.full(latents.shape[:2], timestep), p, attend=attend)

            return guidance.guide(predict, prepared, scale)(x)

        state = solvers.run(rows, state, velocity)
    return state.x


@functools.partial(jax.jit, static_argnames=("boundary", "config", "on_step"))
def clip(
    networks: Mapping[str, WorldDiT],
    codec: Codec,
    encoded: Encoded,
    negative: Float[Array, "1 l d"] | None,
    seed: Integer[Array, ""],
    indices: Int[Array, "b"],
    attend: Attend,
    boundary: float,
    config: SampleConfig,
    on_step: Callable[[], None] | None,
) -> Float[Array, "b f H W 3"]:
    """A clip per row, as one program: `denoise`, then the decoder."""
    shape = encoded.conditioning.image.shape
    own = next(iter(networks.values())).config
    condition = make_condition(own, shape[2:4], encoded.text, encoded.camera, encoded.conditioning)
    negative = None if negative is None else jnp.broadcast_to(negative, encoded.text.shape)
    noise = draw_noise(seed, indices, shape[1:])
    latents = denoise(networks, boundary, noise, condition, negative, config, attend, on_step)
    return codec.decode(latents)


def sample_config(config: WorldConfig, field: str = "world") -> SampleConfig:
    """How a world samples whole clips. Raises ConfigError for a world that cannot: one of two experts alone, or a
    causal one."""
    names = set(config.networks)
    if len(names & set(EXPERTS)) == 1:
        (name,) = names
        other = EXPERTS[1 - EXPERTS.index(name)]
        raise ConfigError(
            f"{field}: has the noise expert {name!r} alone, which knows one region of noise levels; join it with "
            f"{other!r}: experiments.convert --source=high=RUN,low=RUN"
        )
    if config.sample is None:
        raise ConfigError(f"{field}: generates chunks and does not sample whole clips; use --mode=fast")
    return config.sample


def sample_clips(
    world: World,
    clips: Clips,
    config: SampleConfig | None = None,
    *,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    on_step: Callable[[], None] | None = None,
) -> Float[np.ndarray, "b f H W 3"]:
    """Samples one clip per row, on the world's mesh; all steps and the decoder are one compiled program.

    Args:
      clips: of which the known frames, camera and prompts are looked at (`worlds.clips.prepare`); the same in every
        process of the job. Rows are padded to what the mesh divides.
      config: None: the world's own. seed, indices: sample i draws its noise from (seed, indices[i]); default 0, 1...
      on_step: called on the host at every step; another one is another program.

    Returns:
      Video in [-1, 1], in every process. Repeated calls of the same sizes run the same compiled program.

    Raises:
      ConfigError: a world that does not sample whole clips (`sample_config`), or sizes that do not fit.
    """
    config = sample_config(world.config) if config is None else config
    batch = len(clips.known)
    indices = np.arange(batch) if indices is None else np.asarray(indices)
    rows = int(np.prod([world.mesh.shape[axis] for axis in BATCH_AXES]))
    clips, indices = pad_rows((clips, indices), -(-batch // rows) * rows)
    placed = multihost.place_rows(world.mesh, clips)
    negative = world.encode_negative(config) if config.guidance.guided else None
    with jax.set_mesh(world.mesh):
        encoded = encode_condition(world.codec, world.text, placed, latents=False)
        video = clip(
            world.networks,
            world.codec,
            encoded,
            negative,
            jnp.uint32(seed),
            jnp.asarray(indices),
            world.attend,
            world.config.boundary,
            config,
            on_step,
        )
    return multihost.to_host(video)[:batch]


def pad_rows(tree: Any, rows: int) -> Any:
    """Host arrays with their last row repeated until there are `rows`."""
    grow = lambda x: np.concatenate([x, np.repeat(x[-1:], rows - len(x), axis=0)]) if len(x) < rows else x
    return jax.tree.map(grow, tree)
