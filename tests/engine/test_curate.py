"""The curator from end to end on a rendered video with a cut, and its stages alone."""

import dataclasses
import json
import pathlib

import cv2
import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.control.keyboard import STEP, integrate, keys_from_poses, parse
from lingbot_jax.control.odometry import Path, levelled, rotation_between
from lingbot_jax.data.config import DataConfig
from lingbot_jax.data.loader import Dataset
from lingbot_jax.data.records import ErrorBudget, Records, file_sha256, find_shards
from lingbot_jax.data.schema import decode
from lingbot_jax.engine.collect.config import CollectConfig
from lingbot_jax.engine.curate import pipeline
from lingbot_jax.engine.curate.caption import check_static, check_temporal
from lingbot_jax.engine.curate.config import CurateConfig, SelectConfig, SplitConfig
from lingbot_jax.engine.curate.frames import fit
from lingbot_jax.engine.curate.items import Clip, Rejected, Video, from_json, to_json
from lingbot_jax.engine.curate.pose import believed, intrinsics
from lingbot_jax.engine.curate.profile import bars, perceptual_hash, profile, sharpness
from lingbot_jax.engine.curate.select import Summary, duplicates, select
from lingbot_jax.engine.curate.shots import shots
from tests.bench.curate import aligned_error, degrees, steps
from tests.engine.textured import record, write_video

FRAMES = 25


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    scenes = CollectConfig(
        out=str(tmp_path_factory.mktemp("scenes")),
        clips=2,
        held_out=0,
        frames=FRAMES,
        size=(240, 320),
        clips_per_map=1,
        seed=24,
        behaviours={"loop_roaming": 1.0},
        people=0.0,
        weather_changes=0.0,
    )
    with pytest.MonkeyPatch.context() as patch:
        return record(scenes, patch)


@pytest.fixture(scope="module")
def curated(truth, tmp_path_factory):
    folder = tmp_path_factory.mktemp("curated")
    (folder / "videos").mkdir()
    write_video(folder / "videos" / "walk.mp4", np.concatenate([c.frames for c in truth]))
    write_video(folder / "videos" / "night.mp4", np.zeros((30, 64, 64, 3), np.uint8))
    (folder / "videos" / "note.txt").write_text("not a video")
    config = CurateConfig(
        source=str(folder / "videos"),
        out=str(folder / "out"),
        size=(48, 64),
        split=SplitConfig(min_frames=17, max_frames=33),
    )
    return config, pipeline.curate(config)


def test_a_video_becomes_clips_with_true_poses_and_keys(truth, curated):
    config, said = curated
    assert said["kept"] == 2 and said["clips_in"] == 4
    assert said["dropped"] == {"probe": {"not a video": 1}, "profile": {"black": 1}}
    rows = list(map(json.loads, pathlib.Path(config.out, "dropped.jsonl").read_text().splitlines()))
    assert [(r["file"], r["stage"]) for r in rows] == [("night.mp4", "profile"), ("note.txt", "probe")]
    records = Records(find_shards(config.out, "train"), ErrorBudget(0))
    for i, true in enumerate(truth):
        clip = decode(records[i])
        assert clip.frames.shape[1:] == (48, 64, 3) and len(clip) >= FRAMES - 3
        at = round(clip.extra["start"] * clip.fps) - i * FRAMES
        assert at >= 0 and at + len(clip) <= FRAMES, "a clip across the cut"
        part = true.crop(at, len(clip))
        small = np.stack([cv2.resize(f, (64, 48), interpolation=cv2.INTER_AREA) for f in part.frames])
        assert np.abs(clip.frames.astype(int) - small).mean() < 4
        assert np.median(degrees(steps(clip.c2w), steps(part.c2w))) < 0.15
        path = np.linalg.norm(np.diff(part.c2w[:, :3, 3], axis=0), axis=1).sum()
        assert aligned_error(clip.c2w[:, :3, 3], part.c2w[:, :3, 3]) <= 0.03 * path + 1e-9
        moved = np.linalg.norm(np.diff(clip.c2w[:, :3, 3], axis=0), axis=1)
        assert not path or abs(np.median(moved[moved > 0]) / STEP - 1) < 0.2
        assert (clip.keys[1:] == keys_from_poses(part.c2w)[1:]).mean() > 0.98
        assert abs(clip.intrinsics[0, 0] / 32 - 1) < 0.2 and clip.extra["pose"]["intrinsics"] == "estimated"


def test_training_takes_what_was_curated(curated):
    batch = Dataset(DataConfig(path=curated[0].out, frames=17, batch=2)).rows(0, range(2))
    assert batch["frames"].shape == (2, 17, 48, 64, 3) and all("scene" in s for s in batch["static"])


def test_finished_parts_are_not_done_again_and_the_bytes_are_the_same(curated):
    config, said = curated
    hashes = {p.name: file_sha256(p) for p in find_shards(config.out, "train")}
    parts = lambda: {p.name: p.stat().st_mtime_ns for p in pathlib.Path(config.out, pipeline.WORK).iterdir()}
    before = parts()
    assert pipeline.curate(config)["kept"] == said["kept"] and parts() == before
    find_shards(config.out, "train")[0].unlink()
    pipeline.curate(config)
    assert {name.split("-")[0] for name, when in parts().items() if when != before[name]} == {"write"}
    assert {p.name: file_sha256(p) for p in find_shards(config.out, "train")} == hashes
    with pytest.raises(ConfigError, match="config.fps = 12.0: .* begun with 16.0"):
        pipeline.curate(dataclasses.replace(config, fps=12.0))


def test_a_stage_that_breaks_is_a_dead_letter(curated, tmp_path, monkeypatch):
    """Whatever it raises; the other clips go on."""
    config = dataclasses.replace(curated[0], out=str(tmp_path / "out"))

    def broken(config, clip):
        if clip.start > 1:
            raise ValueError("a library's own")
        raise Rejected("enough")

    monkeypatch.setattr(pipeline.stages, "ON_CLIPS", (("profile", broken),))
    said = pipeline.curate(config)
    assert said["kept"] == 0 and said["clips_in"] == 4
    assert said["dropped"]["profile"] == {"failed": 1, "enough": 2}


def test_shots_end_at_cuts(tmp_path):
    rng = np.random.default_rng(2)
    scenes = [cv2.resize(rng.integers(0, 255, (6, 8, 3), np.uint8), (96, 72)) for _ in range(3)]
    frames = np.concatenate(
        [np.stack([np.roll(s, k, 1) for k in range(n)]) for s, n in zip(scenes, (20, 31, 15), strict=True)]
    )
    write_video(tmp_path / "v.mp4", frames)
    video = Video(str(tmp_path / "v.mp4"), "v.mp4", 1, "h264", 72, 96, 0, 16.0, 0.0, 65 / 16)
    for split in (SplitConfig(), SplitConfig(detector="content", threshold=27.0)):
        found = shots(CurateConfig(source="s", out="o", split=split), video)
        assert [round(16 * a) for a, _ in found] == [0, 20, 51] and round(16 * found[-1][1]) == 65


def noise(height=72, width=96, seed=0):
    rng = np.random.default_rng(seed)
    return cv2.resize(
        rng.integers(0, 255, (18, 24), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC
    )


def test_bars_are_found_to_a_pixel():
    grey = np.stack([np.roll(noise(), k, 1) for k in range(4)]) // 2 + 60
    assert bars(grey) == (0.0, 1.0, 0.0, 1.0)
    boxed = np.zeros_like(grey)
    boxed[:, 9:63, 12:84] = grey[:, 9:63, 12:84]
    top, bottom, left, right = bars(boxed)
    assert (round(top * 72), round(bottom * 72), round(left * 96), round(right * 96)) == (10, 62, 13, 83)
    assert bars(np.zeros((2, 72, 96), np.uint8)) == (0.0, 1.0, 0.0, 1.0)


def test_blur_and_hashes():
    sharp = noise()
    blurred = cv2.GaussianBlur(sharp, (0, 0), 8)
    assert (
        sharpness(sharp[None])[0] > 2 * sharpness(blurred[None])[0]
        and sharpness(np.zeros((1, 72, 96), np.uint8)) == 0
    )
    same = cv2.resize(cv2.GaussianBlur(sharp, (0, 0), 1), (64, 48)) // 2 + 40
    assert (perceptual_hash(sharp) ^ perceptual_hash(same)).bit_count() <= 4
    assert (perceptual_hash(sharp) ^ perceptual_hash(noise(seed=1))).bit_count() > 16


@pytest.mark.parametrize("reason", ["frozen", "blurred"])
def test_frozen_and_blurred_clips_are_dropped(reason, tmp_path):
    grey = (
        [noise()] * 20
        if reason == "frozen"
        else [cv2.GaussianBlur(np.roll(noise(), 3 * k, 1), (0, 0), 6) for k in range(20)]
    )
    write_video(tmp_path / "v.mp4", np.stack([np.repeat(g[..., None], 3, -1) for g in grey]))
    video = Video(str(tmp_path / "v.mp4"), "v.mp4", 1, "h264", 72, 96, 0, 16.0, 0.0, 19 / 16)
    with pytest.raises(Rejected) as caught:
        profile(CurateConfig(source="s", out="o", size=(48, 64)), Clip(video, 0.0, 20, 16.0))
    assert caught.value.reason == reason


def test_the_intrinsics_are_those_of_the_cut_picture():
    """A point projected into the whole picture, then boxed, scaled and cut, lies where the record's intrinsics say."""
    video = Video("p", "n", 1, "h264", 360, 640, 0, 16.0)
    clip = Clip(video, 0.0, 2, 16.0, (0.1, 0.95, 0.05, 0.9))
    config = CurateConfig(source="s", out="o", size=(48, 64))
    point = np.array([0.2, -0.1, 1.0])
    x, y = 0.7 * 640 * point[0] + 320, 0.7 * 640 * point[1] + 180
    (rows, columns), (top, left) = fit(video, clip.box, config.size)
    wanted = (x / 640 - 0.05) / 0.85 * columns - left, (y / 360 - 0.1) / 0.85 * rows - top
    fx, fy, cx, cy = intrinsics(config, clip, 0.7)
    assert np.allclose((fx * point[0] + cx, fy * point[1] + cy), wanted, atol=0.2)


def test_a_rotation_is_found_beside_points_that_move():
    rng = np.random.default_rng(4)
    a = np.concatenate([rng.uniform(-1, 1, (200, 2)), np.ones((200, 1))], 1)
    true = integrate(parse("li-1"), yaw_degrees=3.0, pitch_degrees=2.0)[1, :3, :3].T
    b = a @ true.T
    b /= b[:, 2:]
    b[:40, :2] += rng.uniform(0.02, 0.1, (40, 2))
    found, left = rotation_between(a, b)
    assert degrees(found[None], true[None])[0] < 5e-3 and np.median(left) < 1e-4


@pytest.mark.parametrize("keys", ["w-8,wl-20,i-5,wj-9", "l-20,i-5", "w-20"])
def test_a_tilted_path_is_levelled(keys):
    """Whatever the first camera's pitch: the ground of the path becomes the world's."""
    start = integrate(parse("k-9"))[-1]
    true = integrate(parse(keys), start)
    seen = np.linalg.inv(true[0]) @ true
    ones = np.ones(len(true))  # turning alone tells it, and a straight walk alone
    path = levelled(Path(seen, ones.astype(int), ones.astype(bool), ones, 0 * ones))
    assert np.allclose(path[:, :3, :3], true[:, :3, :3], atol=5e-3)
    assert (keys_from_poses(path) == keys_from_poses(true)).all()


def test_the_longest_believed_stretch():
    bad, apart = np.zeros(60, bool), np.zeros(60, bool)
    bad[20] = True
    apart[[30, 31, 50]] = True
    begin, end = believed({"broken": bad}, apart)
    assert (begin, end) == (20, 60) or apart[begin + 1 : end].sum() <= 0.05 * (end - begin - 1)
    assert not bad[begin + 1 : end].any() and end - begin >= 29
    assert believed({"broken": np.ones(5, bool)}, np.zeros(5, bool)) == (0, 0)


def summaries(count, seed=0, videos=5):
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**63, (count, 3))
    values = lambda: {"motion": float(rng.choice([0.001, 0.005, 0.02])), "turning": 0.5, "brightness": 100.0}
    return [
        Summary(f"c{i:03d}", f"v{i % videos}", tuple(map(int, hashes[i])), values(), ("p", i))
        for i in range(count)
    ]


def test_near_duplicates_are_those_of_a_comparison_of_all():
    rng = np.random.default_rng(1)
    clips = summaries(60)
    for i in range(0, 40, 4):
        flipped = [
            h ^ int(sum(1 << int(b) for b in rng.choice(63, int(rng.integers(0, 8)), False)))
            for h in clips[i].hashes
        ]
        clips[i + 1] = dataclasses.replace(clips[i + 1], hashes=tuple(flipped))
    found = duplicates(clips, 4)
    near = lambda a, b: all((x ^ y).bit_count() <= 4 for x, y in zip(a.hashes, b.hashes, strict=True))
    wanted = {clips[i + 1].clip_id: clips[i].clip_id for i in range(0, 40, 4) if near(clips[i], clips[i + 1])}
    assert found == wanted and 0 < len(found) < 10


def test_target_shares_are_reached_and_splits_share_no_video():
    config = CurateConfig(
        source="s", out="o", select=SelectConfig(shares={"motion": {"low": 0.5, "high": 0.5}}, held_out=0.2)
    )
    clips = summaries(200)
    splits, out = select(config, clips)
    kept = [*splits["train"], *splits["held_out"]]
    levels = [s.level("motion") for s in kept]
    assert abs(levels.count("low") / len(levels) - 0.5) < 0.02 and "medium" not in levels
    have = [s.level("motion") for s in clips]
    assert len(kept) >= 2 * min(have.count("low"), have.count("high")) - 1
    assert {s.video for s in splits["held_out"]}.isdisjoint({s.video for s in splits["train"]}) and splits[
        "held_out"
    ]
    assert len(kept) + len(out) == len(clips) and {r.reason for r in out.values()} == {"over target share"}


def test_captions_are_held_to_their_kind():
    check_static("A bright scene in reddish tones, a door and a bridge.")
    for text in ("The camera turns left.", "A street; then a door.", "Someone walking by."):
        with pytest.raises(Rejected, match="motion"):
            check_static(text)
    event = lambda a, b: {"start": a, "end": b, "text": "The camera walks.", "kind": "camera"}
    check_temporal([event(0.0, 1.0), event(1.0, 2.5)], 2.5)
    for wrong in (
        [event(0.0, 1.0), event(1.2, 2.5)],
        [event(0.0, 1.5), event(1.0, 2.5)],
        [event(0.0, 2.0)],
        [],
    ):
        with pytest.raises(Rejected, match="temporal"):
            check_temporal(wrong, 2.5)


def test_references_are_json():
    clip = Clip(Video("/a/b.mp4", "b.mp4", 3), 1.5, 33, 16.0, (0.1, 0.9, 0.0, 1.0)).noted(
        "split", {"shot": 2}
    )
    assert from_json(json.loads(json.dumps(to_json(clip)))) == clip
