"""Pictures to start from, for a bundle: first frames of held-out clips of a run's data, or image files."""

import pathlib
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from lingbot_jax import files
from lingbot_jax.config import ConfigError, build, require
from lingbot_jax.convert.contents import Contents
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.worlds import manifest
from lingbot_jax.worlds.config import pixels_per_token
from lingbot_jax.worlds.manifest import MAX_PICTURES, Intrinsics, Starts
from lingbot_jax.worlds.open import RUN

if TYPE_CHECKING:
    from lingbot_jax.data.schema import Clip

LOOKED_AT = 8  # clips per picture that is wanted: the most colourful are taken
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def choose(pictures: str | None, contents: Contents) -> Starts:
    """The pictures of `--pictures`: a number (of clips of the run's data), a folder, or those of the bundle itself.

    Raises:
      ConfigError: no such folder, a file that is no image, or a source that has no data.
    """
    if pictures is None:
        return _of_bundle(contents)
    if not pictures.isdigit():
        return _of_folder(pathlib.Path(pictures), contents)
    count = int(pictures)
    require(1 <= count <= MAX_PICTURES, "pictures", count, f"must be 1 to {MAX_PICTURES}, or a folder")
    require(
        contents.kind == "run",
        "pictures",
        count,
        f"clips are taken from a run's data, this is a {contents.kind}",
    )
    return _of_run(count, contents)


def _of_bundle(contents: Contents) -> Starts:
    folder = manifest.epath.Path(contents.path)
    kept = manifest.read(folder, "source") if contents.kind == "bundle" else None
    if kept is None:
        return Starts()
    shown = tuple((manifest.image(folder, p), p.prompt, p.intrinsics) for p in kept.pictures)
    return Starts(shown, kept.fps)


def _run_config(contents: Contents) -> TrainConfig:
    path = pathlib.Path(contents.path) / RUN
    return build(TrainConfig, files.read_json(path, "source"), f"{path}: config")


def _of_run(count: int, contents: Contents) -> Starts:
    from lingbot_jax.data.latents import read_manifest  # needs an extra
    from lingbot_jax.data.records import ErrorBudget, Records, find_shards
    from lingbot_jax.data.schema import ClipError, decode

    run = _run_config(contents)
    latents = read_manifest(run.data.path)  # knows which clips it was made of
    folder = run.data.path if latents is None else latents.clips
    records = Records(find_shards(folder, "held_out"), ErrorBudget(run.data.max_bad_records))
    clips = []
    for i in np.linspace(0, len(records) - 1, min(len(records), count * LOOKED_AT)).astype(int):
        blob = records[int(i)]
        try:
            clips += [] if blob is None else [decode(blob).crop(0, 1)]
        except ClipError as error:
            records.budget.report(records.name(int(i)), str(error))
    clips.sort(key=lambda clip: -clip.frames.std(axis=(0, 1, 2)).sum())
    places: dict[tuple[str, str], int] = {}
    turn = []  # how many of the same place come before: one of each place, before a second of any
    for clip in clips:
        place = (clip.map, clip.captions.static)
        places[place] = places.get(place, -1) + 1
        turn.append(places[place])
    clips = [clips[i] for i in np.argsort(turn, kind="stable")]
    return Starts(tuple(_start(clip, run) for clip in clips[:count]), float(clips[0].fps) if clips else None)


def _start(clip: "Clip", run: TrainConfig) -> tuple[UInt8[np.ndarray, "h w 3"], str, Intrinsics]:
    from lingbot_jax.rollout.images import cover  # needs an extra

    size = clip.frames.shape[1:3] if run.size == (0, 0) else run.size
    image, rows = cover(clip.frames[0], size, clip.intrinsics)
    return image, getattr(clip.captions, run.world.caption), tuple(float(v) for v in rows[0])


def _of_folder(folder: pathlib.Path, contents: Contents) -> Starts:
    """Image files in the order of their names; the prompt is in NAME.txt beside each, or is its name."""
    from lingbot_jax.rollout.images import cover, read_image  # needs an extra

    if not folder.is_dir():
        raise ConfigError(f"pictures = {str(folder)!r}: neither a number nor a folder")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    few = f"must hold 1 to {MAX_PICTURES} images ({' '.join(SUFFIXES)})"
    require(1 <= len(found) <= MAX_PICTURES, "pictures", str(folder), few)
    images = [read_image(path, "pictures") for path in found]
    step = pixels_per_token(contents.config.network)
    size = tuple(side // s * s for side, s in zip(images[0].shape[:2], step, strict=True))
    require(min(size) > 0, "pictures", str(found[0]), f"must be at least {step[1]}x{step[0]} pixels")
    if contents.kind == "run" and (run := _run_config(contents)).size != (0, 0):
        size = run.size
    text = lambda p: (
        p.with_suffix(".txt").read_text().strip() if p.with_suffix(".txt").is_file() else _words(p)
    )
    shown = tuple(
        (cover(image, size)[0], text(path), None) for image, path in zip(images, found, strict=True)
    )
    return Starts(shown)


def _words(path: pathlib.Path) -> str:
    return path.stem.replace("_", " ").replace("-", " ")
