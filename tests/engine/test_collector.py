"""The collector with the real game: the bytes, whoever makes them and however often it is killed."""

import dataclasses
import json
import mmap
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
from huggingface_hub import DatasetCard

from lingbot_jax.config import ConfigError
from lingbot_jax.control.keyboard import integrate
from lingbot_jax.data.records import ErrorBudget, Records, file_sha256, find_shards
from lingbot_jax.data.schema import decode, encode
from lingbot_jax.engine.collect import engines
from lingbot_jax.engine.collect.collector import CollectError, _alone, collect, make_shard
from lingbot_jax.engine.collect.config import BEHAVIOURS, CollectConfig
from lingbot_jax.engine.collect.source import EngineLost, MapName, Task, plan
from lingbot_jax.engine.collect.vizdoom_source import VizdoomSource
from tests.data.clips import make_clip

SETTINGS = {
    "source": "vizdoom",
    "clips": 14,
    "held_out": 4,
    "frames": 9,
    "clips_per_map": 2,
    "clips_per_shard": 4,
    "bundled": 0.3,
    "behaviours": dict.fromkeys(BEHAVIOURS, 1.0),
    "seed": 11,
}
PROGRAM = """
import sys, json
from lingbot_jax.engine.collect.collector import collect
from lingbot_jax.engine.collect.config import CollectConfig
from tests.engine.slow_source import slow_source
collect(CollectConfig(**json.loads(sys.argv[1])), slow_source)
"""
ROOT = Path(__file__).parents[2]


def settings(out: Path, **fields):
    return {"out": str(out), **SETTINGS, **fields}


def hashes(out: Path) -> dict[str, str]:
    return {p.name: file_sha256(p) for p in sorted(out.glob("*.array_record"))}


def left_engines(out: Path) -> list[psutil.Process]:
    """Game processes that work in this folder."""
    found = []
    for p in psutil.process_iter(["name", "cmdline"]):
        if p.info["name"] == "vizdoom" and any(str(out) in a for a in p.info["cmdline"] or ()):
            found.append(p)
    return found


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """A data set by two processes; the other tests must get the same bytes."""
    out = tmp_path_factory.mktemp("collected")
    summary = collect(CollectConfig(**settings(out, processes=2)))
    assert (summary.clips, summary.made, summary.frames) == (18, 18, 162)
    assert not left_engines(out)
    return out


def clips(out: Path, split: str):
    records = Records(find_shards(out, split), ErrorBudget(0))
    return [decode(records[i]) for i in range(len(records))]


def test_data_set_is_complete(collected):
    names = {p.name for p in collected.iterdir()}
    assert names == {".lock", "README.md", "collect.json", "dataset.json", *hashes(collected)}
    described = json.loads((collected / "dataset.json").read_text())
    assert {k: v["clips"] for k, v in described["splits"].items()} == {"train": 14, "held_out": 4}
    assert described["splits"]["train"]["frames"] == 14 * 9
    assert described["splits"]["train"]["sources"] == {"vizdoom": 14}
    written = {n: s["sha256"] for split in described["splits"].values() for n, s in split["shards"].items()}
    assert written == hashes(collected)
    train, held = clips(collected, "train"), clips(collected, "held_out")
    assert len(train) == 14 and len(held) == 4
    assert not {c.map for c in train} & {c.map for c in held}
    assert {c.behaviour for c in train} == set(BEHAVIOURS)
    assert collect(CollectConfig(**settings(collected))).made == 0


def test_the_card_says_what_there_is_and_how_to_read_it(collected, monkeypatch):
    text = (collected / "README.md").read_text()
    data = DatasetCard(text).data
    assert (data.license, data.size_categories) == ("other", ["n<1K"])
    assert "| train | 14 | 126 | 4 | 7 |" in text and "| held_out | 4 | 36 | 1 | 2 |" in text
    assert "| `seed` | `11` |" in text and "may not be used commercially" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(collected.parent)
    exec(code, names := {})
    assert names["rows"]["frames"].shape == (4, 9, 48, 64, 3)


def test_poses_are_the_keys_integrated(collected):
    """Camera readings of the engine against `control.keyboard`, wherever nothing was in the way."""
    free = 0
    for clip in clips(collected, "train") + clips(collected, "held_out"):
        wanted = integrate(clip.keys, clip.c2w[0], step=0.05, yaw_degrees=3.0)
        moved = np.linalg.norm(np.diff(clip.c2w[:, :3, 3], axis=0), axis=1)
        pressed = clip.keys[1:, :4].any(axis=1)
        assert (moved[~pressed] < 1e-4).all(), "only keys move the player"
        np.testing.assert_allclose(clip.c2w[:, :3, :3], wanted[:, :3, :3], atol=3e-4)
        if (np.abs(clip.c2w[:, 1, 3] - clip.c2w[0, 1, 3]) < 1e-6).all() and (moved[pressed] > 0.01).all():
            free += 1
            np.testing.assert_allclose(clip.c2w[:, :3, 3], wanted[:, :3, 3], atol=1e-4)
        assert clip.frames.std() > 3, "there is something to see"
    assert free >= 9


def test_one_process_makes_the_same_bytes(collected, tmp_path):
    collect(CollectConfig(**settings(tmp_path, processes=1)))
    assert hashes(tmp_path) == hashes(collected)


def start_collector(out: Path) -> subprocess.Popen:
    arguments = json.dumps(settings(out, processes=2))
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, arguments],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill(collector: subprocess.Popen, names: tuple[str, ...], out: Path) -> None:
    """SIGKILL for the collector and those of its family that have one of the names, while engines run."""
    while True:
        assert collector.poll() is None, "the collector was done before it could be killed"
        family = psutil.Process(collector.pid).children(recursive=True)
        chosen = [psutil.Process(collector.pid), *(p for p in family if names and p.name().startswith(names))]
        for process in chosen:
            process.suspend()
        time.sleep(0.3)  # an engine that was just told to leave is gone then
        if left_engines(out):
            break
        for process in chosen:
            process.resume()
        time.sleep(0.05)
    for process in chosen:
        process.kill()
    collector.wait()
    psutil.wait_procs(chosen[1:], timeout=10)


@pytest.mark.parametrize("names", [(), ("python",)], ids=["collector", "collector and workers"])
def test_killed_collector_leaves_no_engine_and_resumes(collected, tmp_path, names):
    """Workers leave when their pipe breaks; when they are killed too, the guards kill the engines."""
    collector = start_collector(tmp_path)
    wait_until(lambda: left_engines(tmp_path) and hashes(tmp_path))
    kill(collector, names, tmp_path)
    wait_until(lambda: not left_engines(tmp_path))
    done = hashes(tmp_path)
    assert done and not (tmp_path / "dataset.json").exists()
    assert 0 < collect(CollectConfig(**settings(tmp_path, processes=2))).made < 18
    assert hashes(tmp_path) == hashes(collected)


def test_engines_without_guard_are_swept_at_the_next_start(collected, tmp_path):
    """Kills all but the engines at once: collector, workers and the guards."""
    collector = start_collector(tmp_path)
    wait_until(lambda: len(left_engines(tmp_path)) == 2)
    kill(collector, ("sh", "dash", "python"), tmp_path)
    orphans = left_engines(tmp_path)
    assert orphans, "the engine survives its parent: that is why there are guards"
    instances = [engines.instance_id(p) for p in orphans]
    collect(CollectConfig(**settings(tmp_path, processes=2)))
    assert not left_engines(tmp_path)
    assert not [n for n in os.listdir("/dev/shm") if any(n.endswith(i) for i in instances)]
    assert hashes(tmp_path) == hashes(collected)


def test_lost_engine_is_replaced(collected, tmp_path):
    """A worker's engine is killed: the shard is made again, with the same bytes."""
    collector = start_collector(tmp_path)
    wait_until(lambda: left_engines(tmp_path))
    left_engines(tmp_path)[0].kill()
    assert collector.wait(120) == 0
    assert hashes(tmp_path) == hashes(collected)


def test_dead_engine_is_an_engine_lost(tmp_path):
    config = CollectConfig(**settings(tmp_path))
    shard = plan(config)[0]
    source = VizdoomSource(config, engines.folder(tmp_path), [t.map for t in shard.tasks])
    encode(source.record(shard.tasks[0]))
    (engine,) = left_engines(tmp_path)
    engine.kill()
    with pytest.raises(EngineLost):
        source.record(shard.tasks[1])
    source.close()
    children = psutil.Process().children()
    assert not left_engines(tmp_path) and not [p for p in children if p.name() == "vizdoom"], (
        "no zombie either"
    )


def test_shared_memory_that_nobody_maps_is_removed():
    """What is left when an engine dies while starting. Only that which is old and not in use."""
    paths = [Path("/dev/shm") / f"ViZDoomMQCtrtest{os.getpid()}-{k}" for k in range(3)]
    try:
        for path in paths:
            path.write_bytes(b"x" * 4096)
        for path in paths[1:]:
            os.utime(path, (0, 0))
        with open(paths[2], "r+b") as file, mmap.mmap(file.fileno(), 4096):
            os.utime(paths[2], (0, 0))
            engines.sweep(Path("/nonexistent"))
            assert [p.exists() for p in paths] == [True, False, True], "young; old; old but in use"
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


class _Broken:
    def __init__(self, *_):
        pass

    def record(self, task):
        raise ValueError(f"no such scene\n{task.clip_id}")

    def close(self):
        pass


class _Videos:
    """Someone's own recordings, whatever the plan says."""

    def __init__(self, *_):
        pass

    def record(self, task):
        made = make_clip(task.index, frames=5 + task.index % 2, split=task.split)
        return dataclasses.replace(made, clip_id=task.clip_id, source="my phone", behaviour="on foot")

    def close(self):
        pass


def test_data_set_is_described_by_its_clips(tmp_path):
    collect(CollectConfig(**settings(tmp_path, processes=1)), make_source=_Videos)
    train = json.loads((tmp_path / "dataset.json").read_text())["splits"]["train"]
    assert train["sources"] == {"my phone": 14} and train["behaviours"] == {"on foot": 14}
    assert train["maps"] == {"map-0": 7, "map-1": 7} and train["frames"] == 7 * 5 + 7 * 6


def test_errors_are_one_line(collected, tmp_path):
    with pytest.raises(CollectError, match="^ValueError: no such scene train-0000000$"):
        collect(CollectConfig(**settings(tmp_path, processes=1)), make_source=_Broken)
    assert not hashes(tmp_path)
    with pytest.raises(
        ConfigError, match=r"config.seed = 12: the clips in .* were made with 11; choose another"
    ):
        collect(CollectConfig(**settings(collected, seed=12)))
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below", "x" * 300):
        with pytest.raises(ConfigError, match=r"^config\.out = '") as caught:
            collect(CollectConfig(**settings(tmp_path / out)))
        assert "\n" not in str(caught.value)
    with _alone(tmp_path), pytest.raises(CollectError, match="another collector is at work"):
        collect(CollectConfig(**settings(tmp_path)))


@pytest.fixture(scope="module")
def turn_and_walk(tmp_path_factory):
    """A clip of turning and one of walking in a generated map, at 160 x 120."""
    config = CollectConfig(
        out="unused", frames=9, size=(120, 160), behaviours={"stationary_360": 1.0, "loop_roaming": 1.0}
    )
    work = engines.folder(tmp_path_factory.mktemp("source"))
    room = MapName("rooms4-1", 1)
    source = VizdoomSource(config, work, [room])
    try:
        yield lambda behaviour, index: source.record(Task("train", index, room, behaviour))
    finally:
        source.close()


def _error(image, other, where):
    return np.abs(image.astype(float) - other)[where].mean()


def _intrinsic(clip, fx=1.0, fy=1.0):
    a, b, cx, cy = clip.intrinsics[0]
    return np.array([[a * fx, 0, cx - 0.5], [0, b * fy, cy - 0.5], [0, 0, 1]])  # OpenCV: centres at integers


def _warped(clip, j, homography):
    """Frame j seen from frame 0's camera: `homography` maps pixels of frame 0 to pixels of frame j."""
    size = clip.frames.shape[2], clip.frames.shape[1]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    image = cv2.warpPerspective(clip.frames[j], homography, size, flags=flags)
    inside = cv2.warpPerspective(np.ones(size[::-1], np.uint8), homography, size, flags=cv2.WARP_INVERSE_MAP)
    return image, inside > 0


def test_turning_is_the_homography_of_poses_and_intrinsics(turn_and_walk):
    """K R K^-1 must carry one frame onto another: keys, yaw sign and fx, cx against the pixels alone."""
    scores = {}
    for name, fx, sign in (("ours", 1.0, 1), ("longer", 1.1, 1), ("shorter", 0.9, 1), ("other way", 1.0, -1)):
        errors = []
        for index in range(4):
            clip = turn_and_walk("stationary_360", index)
            relative = clip.c2w[6, :3, :3].T @ clip.c2w[0, :3, :3]
            relative = relative if sign > 0 else relative.T
            k = _intrinsic(clip, fx)
            image, inside = _warped(clip, 6, k @ relative @ np.linalg.inv(k))
            errors.append(_error(clip.frames[0], image, inside))
        scores[name] = float(np.mean(errors))
    assert scores["ours"] < 0.75 * min(v for k, v in scores.items() if k != "ours"), scores


def test_walking_moves_the_floor_by_the_poses(turn_and_walk):
    """The plane of the floor, 41 map units below the eye, moves as translation, scale and fy say."""
    scores = {"ours": [], "still": [], "twice": [], "lower": [], "taller": []}
    for index in range(30):
        clip = turn_and_walk("loop_roaming", index)
        if not clip.keys[1:4, 0].all():
            continue
        relative = np.linalg.inv(clip.c2w[3]) @ clip.c2w[0]
        rows = np.arange(120)[:, None] >= 95  # floor, unless a wall is very close
        for name, scale, fy in (
            ("ours", 1, 1),
            ("still", 0, 1),
            ("twice", 2, 1),
            ("lower", 1, 1 / 1.2),
            ("taller", 1, 1.2),
        ):
            k, height = _intrinsic(clip, fy=fy), 0.41
            plane = relative[:3, :3] + scale * relative[:3, 3:] @ np.array([[0, 1.0, 0]]) / height
            image, inside = _warped(clip, 3, k @ plane @ np.linalg.inv(k))
            scores[name].append(_error(clip.frames[0], image, inside & rows))
    means = {name: float(np.mean(v)) for name, v in scores.items()}
    assert len(scores["ours"]) >= 3
    assert means["ours"] < 0.8 * min(v for k, v in means.items() if k != "ours"), means


def test_make_shard_removes_what_it_began(tmp_path):
    config = CollectConfig(**settings(tmp_path))
    with pytest.raises(ValueError, match="no such scene"):
        make_shard(config, _Broken, plan(config)[0], tmp_path, lambda: None)
    assert not list(tmp_path.glob("*.array_record")) and not list(tmp_path.glob(".*.partial"))
