"""The curator on rendered clips with textures, 320 x 240, encoded as ordinary videos of four shots: what is kept, how
right its poses and keys are, and what an hour of footage costs. One JSON line.

    python -m tests.bench curate --clips=48 --seed=1 [--focal=0.5]
"""

import argparse
import json
import pathlib
import tempfile

import numpy as np
import pytest

from lingbot_jax.control.keyboard import STEP, keys_from_poses
from lingbot_jax.data.records import ErrorBudget, Records, find_shards
from lingbot_jax.data.schema import Clip, decode
from lingbot_jax.engine.collect.config import CollectConfig
from lingbot_jax.engine.curate.config import CurateConfig, PoseConfig, SelectConfig
from lingbot_jax.engine.curate.pipeline import curate
from tests.engine.textured import record, write_video

FRAMES, SHOTS, FPS, WRONG = 65, 4, 16.0, 0.05


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench curate", description=__doc__)
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--focal", type=float, default=None, help="given, in widths; estimated by default")
    given = parser.parse_args(arguments)
    print(json.dumps(measure(given.clips, given.seed, given.focal)))


def measure(count: int, seed: int, focal: float | None) -> dict:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        source, out = pathlib.Path(folder, "videos"), pathlib.Path(folder, "out")
        source.mkdir()
        scenes = CollectConfig(
            out=folder, clips=count, held_out=0, frames=FRAMES, size=(240, 320), clips_per_map=1, seed=seed
        )
        truth = record(scenes, patch)
        for v in range(0, count, SHOTS):
            write_video(
                source / f"{v:04d}.mp4", np.concatenate([c.frames for c in truth[v : v + SHOTS]]), FPS
            )
        config = CurateConfig(
            source=str(source), out=str(out), pose=PoseConfig(focal=focal), select=SelectConfig(held_out=0.0)
        )
        said = curate(config)
        records = Records(find_shards(out, "train"), ErrorBudget(0))
        return compare(truth, [decode(records[i]) for i in range(len(records))]) | costs(said, count) | said


def costs(said: dict, count: int) -> dict:
    """CPU seconds by stage for an hour of footage that reaches the first stage."""
    hours = count * FRAMES / FPS / 3600
    return {"cpu_seconds_per_hour": {stage: round(cpu / hours) for stage, cpu in said["cpu_seconds"].items()}}


def compare(truth: list[Clip], kept: list[Clip]) -> dict:
    """Figures of kept clips against the poses and keys that they were rendered with."""
    moves = lambda clip: np.linalg.norm(np.diff(clip.c2w[:, :3, 3], axis=0), axis=1).sum() > 0.2
    moving = {i for i, clip in enumerate(truth) if moves(clip)}
    found, turns, cells, rows, wrong, errors, crossing, focals = set(), [], [], [], 0, [], 0, []
    for clip in kept:
        first = int(clip.extra["file"].split(".")[0]) * FRAMES + round(clip.extra["start"] * FPS)
        index, at = divmod(first, FRAMES)
        if at + len(clip) > FRAMES:
            crossing += 1
            continue
        true = truth[index].crop(at, len(clip))
        focals.append(float(clip.intrinsics[0, 0] / true.intrinsics[0, 0]))
        turns.append(degrees(steps(true.c2w), steps(clip.c2w)))
        told = keys_from_poses(true.c2w, STEP / 2, 0.5, 0.5)  # what a refused step holds is seen by nobody
        cells.append(clip.keys.astype(bool)[1:] == told[1:])
        rows.append(cells[-1].all(1))
        length = np.linalg.norm(np.diff(true.c2w[:, :3, 3], axis=0), axis=1).sum()
        if length > 0.2:
            found.add(index)
            errors.append(aligned_error(clip.c2w[:, :3, 3], true.c2w[:, :3, 3]) / length)
            wrong += errors[-1] > WRONG
    part = lambda values, q: round(float(np.percentile(values, q)), 4) if len(values) else None
    angles = np.concatenate(turns) if turns else np.zeros(0)
    return {
        "clips": len(truth),
        "moving": len(moving),
        "moving_kept": round(len(found) / max(1, len(moving)), 3),
        "kept_wrong": round(wrong / max(1, len(errors)), 3),
        "kept_across_cuts": crossing,
        "path_error_median": part(errors, 50),
        "path_error_max": part(errors, 100),
        "rotation_degrees_median": part(angles, 50),
        "rotation_degrees_p99": part(angles, 99),
        "focal_ratio": [part(focals, q) for q in (0, 50, 100)],
        "keys_agreement": round(float(np.concatenate(cells).mean()), 4) if cells else None,
        "frames_with_all_keys_right": round(float(np.concatenate(rows).mean()), 4) if rows else None,
    }


def steps(c2w: np.ndarray) -> np.ndarray:
    return np.swapaxes(c2w[:-1, :3, :3], 1, 2) @ c2w[1:, :3, :3]


def degrees(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Angles between rotations."""
    cosine = (np.trace(np.swapaxes(a, 1, 2) @ b, axis1=1, axis2=2) - 1) / 2
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def aligned_error(found: np.ndarray, true: np.ndarray) -> float:
    """Root mean square distance after the best similarity (Umeyama)."""
    x, y = found - found.mean(0), true - true.mean(0)
    u, d, vt = np.linalg.svd(y.T @ x)
    s = np.array([1, 1, np.linalg.det(u @ vt)])
    scale = (d * s).sum() / max((x**2).sum(), 1e-30)
    return float(np.sqrt(((scale * x @ (u * s @ vt).T - y) ** 2).sum(1).mean()))
