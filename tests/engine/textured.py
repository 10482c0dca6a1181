"""Rendered places with something on their walls to track: each quad as cells of a brightness of their own."""

import dataclasses
import fractions
import pathlib

import av
import numpy as np

from lingbot_jax.data.schema import Clip
from lingbot_jax.engine.collect import places, rendered_source
from lingbot_jax.engine.collect.config import CollectConfig
from lingbot_jax.engine.collect.source import plan

_CELL, _MOST = 14.0, 40  # map units, cells a side


def textured(mesh: places.Mesh, seed: int) -> places.Mesh:
    rng = np.random.default_rng(seed)
    fields = [f.name for f in dataclasses.fields(places.Mesh)]
    quads = {n: getattr(mesh, n).reshape(-1, 4, *getattr(mesh, n).shape[1:]) for n in fields}
    made: dict[str, list[np.ndarray]] = {n: [] for n in fields}
    for q, (a, b, c, d) in enumerate(quads["corners"]):
        sides = (
            max(np.linalg.norm(b - a), np.linalg.norm(c - d)),
            max(np.linalg.norm(d - a), np.linalg.norm(c - b)),
        )
        n, m = (min(_MOST, max(1, int(np.ceil(side / _CELL)))) for side in sides)
        u, v = np.arange(n + 1)[:, None] / n, np.arange(m + 1) / m
        weight = np.stack([(1 - u) * (1 - v), u * (1 - v), u * v, (1 - u) * v], -1)
        cells = np.stack([weight[:-1, :-1], weight[1:, :-1], weight[1:, 1:], weight[:-1, 1:]], 2).reshape(
            -1, 4
        )
        bright = np.repeat(rng.uniform(0.55, 1.2, n * m), 4)
        for name in fields:
            values = cells @ quads[name][q]
            made[name].append(values * bright[:, None] if name in ("albedo", "far") else values)
    return places.Mesh(**{name: np.concatenate(parts) for name, parts in made.items()})


def record(config: CollectConfig, monkeypatch) -> list[Clip]:
    """The clips of a rendered data set, with textures; `monkeypatch` as pytest's."""

    def place(seed: int) -> places.Place:
        plain = places.generate(seed)
        return dataclasses.replace(plain, mesh=textured(plain.mesh, seed))

    monkeypatch.setattr(rendered_source, "_place", place)
    source = rendered_source.RenderedSource(config)
    clips = [source.record(task) for shard in plan(config) for task in shard.tasks]
    source.close()
    return clips


def write_video(
    path: pathlib.Path, frames: np.ndarray, fps: float = 16.0, times=None, codec="libx264", crf: int = 20
) -> None:
    """RGB frames as a video in the container that the name says; `times` in seconds, in place of a constant rate."""
    times = np.arange(len(frames)) / fps if times is None else times
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fractions.Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf)} if codec == "libx264" else {}
        stream.codec_context.time_base = fractions.Fraction(1, 1000)
        for frame, time in zip(frames, times, strict=True):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = round(1000 * time), fractions.Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
