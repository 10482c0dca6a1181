"""Training on latents that were encoded ahead: what they must be of, and what a run reads of them."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lingbot_jax.config import require
from lingbot_jax.data.latents import LatentsManifest, Reading
from lingbot_jax.data.loader import Dataset
from lingbot_jax.models import params
from lingbot_jax.models.codec import Codec
from lingbot_jax.models.text import TextEncoder
from lingbot_jax.parallel.mesh import MeshConfig, make_mesh
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.training.objectives.world import draw_known
from lingbot_jax.worlds.checksums import sha256_of
from lingbot_jax.worlds.clips import texts_of
from lingbot_jax.worlds.encode import stored_dtype
from lingbot_jax.worlds.open import find, read_module
from lingbot_jax.worlds.world import CODEC

ADVICE = "encode the clips again (experiments.encode)"


def manifest_of(
    codec: Codec,
    text: TextEncoder,
    *,
    frames: int,
    size: tuple[int, int],
    dtype: str | None = None,
    **fields: Any,
) -> LatentsManifest:
    """What latents by these are of; `fields`: the rest of the manifest.

    Args:
      dtype: that latents are stored in; None: as the codec rounds.

    Raises:
      ConfigError: a length or a size that the codec has not.
    """
    stride = codec.config.stride
    require(frames % stride[0] == 1 % stride[0], "config.data.frames", frames, f"must be {stride[0]}n + 1")
    whole = all(side % step == 0 for side, step in zip(size, stride[1:], strict=True))
    require(whole, "config.size", size, f"must be multiples of {stride[1:]} pixels")
    return LatentsManifest(
        codec=_plain(codec.config),
        codec_sha256=sha256_of(params.arrays_of(codec)),
        text=_plain(text.config),
        stride=stride[0],
        memory=codec.config.memory,
        frames=frames,
        size=size,
        dtype=dtype or stored_dtype(codec.config),
        **fields,
    )


def reading_of(config: TrainConfig) -> Reading:
    """What a phase of a run reads of latents."""

    def texts(row: Mapping[str, Any]) -> list[str]:
        return texts_of(config.world, row[config.world.caption], row["temporal"], config.intervals)

    @functools.lru_cache(maxsize=16)
    def known(step: int):
        return draw_known(config.seed, step, config.data.batch, config.tasks)

    return Reading(texts, known)


def check_latents(phases: Sequence[TrainConfig], data: Sequence[Dataset]) -> None:
    """Refuses latents that a phase of a run cannot train on; the world must be complete.

    Raises:
      ConfigError: another codec, text encoder, caption, size or length.
    """
    encoded = [(config, own) for config, own in zip(phases, data, strict=True) if own.latents]
    codec = _codec_sha256(encoded[0][0].codec) if encoded else ""
    for config, own in encoded:
        every = config.validation.every
        why = f"must be 0: {config.data.path} holds latents, and measuring needs clips"
        require(every == 0, "config.validation.every", every, why)
        for part, made in zip(config.data.parts(), own.latents, strict=True):
            _check(config, made, codec, part.path)


def _check(config: TrainConfig, made: LatentsManifest, codec: str, path: str) -> None:
    def check(ok: bool, field: str, own: Any, theirs: Any) -> None:
        require(ok, f"config.{field}", own, f"{path} holds latents of {theirs!r:.80}; {ADVICE}")

    world, tasks = config.world, config.tasks
    for name, theirs in (("codec", made.codec), ("text", made.text)):
        own = _plain(getattr(world, name))
        for field in sorted((own.keys() | theirs.keys()) - {"dtype"}):
            check(
                own.get(field) == theirs.get(field),
                f"world.{name}.{field}",
                own.get(field),
                theirs.get(field),
            )
    check(codec == made.codec_sha256, "codec", config.codec, f"another codec, {made.codec_sha256[:12]}")
    check(world.caption in made.captions, "world.caption", world.caption, made.captions)
    check(config.intervals is None or made.temporal, "tasks.caption", tasks.caption, "clip")
    check(config.size in ((0, 0), made.size), "size", config.size, made.size)
    check(config.data.frames <= made.frames, "data.frames", config.data.frames, made.frames)
    most = tasks.max_conditioning_frames if tasks.continuation > 0 else 1
    fits = made.tail == 0 or most <= made.conditioning
    check(fits, "tasks.max_conditioning_frames", most, made.conditioning)


def _codec_sha256(source: str) -> str:
    """Of the codec that a run uses, on a device of this process: no other need take part."""
    mesh = make_mesh(MeshConfig(fsdp=1), jax.local_devices()[:1])
    return sha256_of(params.arrays_of(read_module(find(source, "config.codec"), CODEC, mesh)))


def _plain(config: Any) -> dict[str, Any]:
    """As JSON reads it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
