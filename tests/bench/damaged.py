"""Damaged files through the curator: each ends as clips or as a reason, and memory stays low. One JSON line.

python -m tests.bench damaged --files=1000
"""

import argparse
import json
import pathlib
import resource
import tempfile

import numpy as np

from lingbot_jax.engine.curate.config import CurateConfig, PoseConfig, SplitConfig
from lingbot_jax.engine.curate.pipeline import curate
from tests.engine.test_curate_probe import pan
from tests.engine.textured import write_video

KINDS = ("mp4", "mkv", "avi", "ts", "flv", "webm")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench damaged", description=__doc__)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(pathlib.Path(folder), given.files, given.seed)))


def measure(folder: pathlib.Path, count: int, seed: int) -> dict:
    source = folder / "videos"
    source.mkdir()
    rng = np.random.default_rng(seed)
    whole = {}
    for kind in KINDS:
        codec = {"avi": "mpeg4", "webm": "libvpx-vp9"}.get(kind, "libx264")
        write_video(folder / f"whole.{kind}", pan(), codec=codec)
        whole[kind] = (folder / f"whole.{kind}").read_bytes()
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        name = f"{i:05d}.{KINDS[rng.integers(len(KINDS))] if rng.random() < 0.2 else kind}"
        (source / name).write_bytes(damaged(whole[kind], rng))
    config = CurateConfig(
        source=str(source),
        out=str(folder / "out"),
        size=(48, 64),
        split=SplitConfig(min_frames=9),
        pose=PoseConfig(focal=0.8, width=64),
    )
    said = curate(config)
    rows = list(map(json.loads, pathlib.Path(config.out, "dropped.jsonl").read_text().splitlines()))
    parts = pathlib.Path(config.out, ".parts").glob("annotate-*.jsonl")
    clips = [json.loads(line) for path in parts for line in path.read_text().splitlines()]
    seen = {row["file"] for row in rows} | {row["clip"]["video"]["name"] for row in clips if "clip" in row}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    failed = sorted({row["detail"] for row in rows if row["reason"] == "failed"})
    return {
        "files": count,
        "lost": count - len(seen),
        "peak_gib": round(peak, 2),
        "failed": failed[:9],
    } | said


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes with one kind of damage: cut, overwritten, zeroed, doubled, bytes or header fields gone wild, no video."""
    at, size = (int(x) for x in rng.integers(0, len(data), 2))
    made = bytearray(data)
    match rng.integers(7):
        case 0:
            return data[:at]
        case 1:
            made[at : at + size // 8] = rng.bytes(len(made[at : at + size // 8]))
        case 2:
            made[at : at + size] = bytes(len(made[at : at + size]))
        case 3:
            made[at:at] = data[: size // 2]
        case 4:
            for place in rng.integers(0, len(made), 1 + size % 40):
                made[place] = rng.integers(256)
        case 5:
            for place in rng.integers(0, min(len(made), 1200), 6):
                made[place : place + 4] = rng.choice(
                    [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x00"]
                )
        case 6:
            return rng.bytes(size) if size % 2 else b"text\n" * (size % 400)
    return bytes(made)
