"""The prober and the decoder: any file ends as a video or as a reason."""

import dataclasses
import functools
import pathlib
import struct
import tempfile

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingbot_jax.config import ConfigError
from lingbot_jax.engine.curate import stages
from lingbot_jax.engine.curate.config import CurateConfig, PoseConfig
from lingbot_jax.engine.curate.frames import fit, read
from lingbot_jax.engine.curate.items import Rejected, Video
from lingbot_jax.engine.curate.probe import ingest, probe
from lingbot_jax.engine.curate.shots import split
from tests.engine.textured import write_video

FRAMES = 40
SHIFT = 2  # pixels per frame


@functools.cache
def pan(height: int = 72, width: int = 96) -> np.ndarray:
    """A picture that moves to the left."""
    rng = np.random.default_rng(0)
    wide = cv2.resize(
        rng.integers(0, 255, (9, 40, 3), np.uint8), (width + SHIFT * FRAMES, height), None, 0, 0, 2
    )
    return np.stack([wide[:, SHIFT * i : SHIFT * i + width] for i in range(FRAMES)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """One video as it should be, and what folders from elsewhere hold besides."""
    made = tmp_path_factory.mktemp("videos")
    write_video(made / "good.mp4", pan())
    good = (made / "good.mp4").read_bytes()
    write_video(made / "good.mkv", pan())
    matroska = (made / "good.mkv").read_bytes()
    (made / "good.mkv").rename(made / "a video without a name for it")
    (made / "tail.mkv").write_bytes(matroska[: len(matroska) * 19 // 20])
    (made / "half.mp4").write_bytes(good[: len(good) // 2])
    (made / "empty.mp4").write_bytes(b"")
    (made / "text.mp4").write_text("a text\n" * 500)
    (made / "note.txt").write_text("a text\n" * 500)  # FFmpeg would draw it
    (made / "list.m3u8").write_text("#EXTM3U\n#EXTINF:3,\ngood.mp4\n")
    (made / "list.ffconcat").write_text("ffconcat version 1.0\nfile good.mp4\n")
    (made / "picture.mp4").write_bytes(cv2.imencode(".jpg", pan()[0])[1].tobytes())
    write_video(made / "short.mp4", pan()[:8])
    write_video(made / "thin.mkv", np.zeros((20, 1, 100_000, 3), np.uint8), codec="ffv1")
    write_video(made / "small.mp4", pan()[:, :32])
    write_video(made / "slow.mp4", pan(), fps=5)
    write_video(made / "absurd.mkv", pan()[:30], times=[*np.arange(29) / 16, 1e7])
    write_video(made / "pause.mkv", pan(), times=np.arange(40) / 16 + 30.0 * (np.arange(40) >= 35))
    with av.open(str(made / "negative.ts"), "w", options={"avoid_negative_ts": "disabled"}) as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = *pan().shape[1:3], "yuv420p"
        for i, picture in enumerate(pan()):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i - 160
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    place = good.index(plain, good.index(b"tkhd"))
    (made / "turned.mp4").write_bytes(good[:place] + turned + good[place + 36 :])
    (made / ".hidden.mp4").write_bytes(good)
    return made


@pytest.fixture(scope="module")
def config(folder) -> CurateConfig:
    return CurateConfig(source=str(folder), out="unused", size=(48, 64), pose=PoseConfig(focal=0.8))


REASONS = {
    "empty.mp4": "empty file",
    "half.mp4": "not a video",
    "text.mp4": "not a video",
    "note.txt": "not a video",
    "list.m3u8": "not a video",
    "list.ffconcat": "not a video",
    "picture.mp4": "not a video",
    "short.mp4": "too short",
    "thin.mkv": "too small",
    "small.mp4": "too small",
    "slow.mp4": "frame rate too low",
    "absurd.mkv": "absurd duration",
    "negative.ts": "negative timestamps",
}


def test_hostile_files_are_dropped_with_a_reason_and_nothing_else_is_lost(config):
    videos = ingest(config)
    outcome = stages.scan(config, videos)
    assert {r["file"]: r["reason"] for r in outcome.dropped if r["stage"] == "probe"} == REASONS
    kept = {clip.video.name: clip for clip in outcome.clips}
    assert set(kept) == {"good.mp4", "turned.mp4", "a video without a name for it", "tail.mkv", "pause.mkv"}
    assert {v.name for v in videos} == set(kept) | set(REASONS)
    assert kept["good.mp4"].frames == FRAMES and 33 <= kept["tail.mkv"].frames < FRAMES
    assert kept["pause.mkv"].frames == 33  # 35, less what is trimmed where it ends
    short = [r for r in outcome.dropped if r["stage"] == "split"]
    assert [(r["file"], r["reason"]) for r in short] == [("pause.mkv", "shot too short")]


def far(a, b) -> float:
    """Mean difference of luma: colours are stored at half the size."""
    return float(np.abs((a.astype(float) - b) @ [0.299, 0.587, 0.114]).mean())


def clip_of(config, name):
    (clip,) = [c for c in stages.scan(config, ingest(config)).clips if c.video.name == name]
    return clip


def test_frames_are_the_pictures_turned_cut_and_scaled(config):
    whole = read(clip_of(config, "good.mp4"), (72, 96))
    assert far(whole, pan()) < 4
    turned = clip_of(config, "turned.mp4")
    assert (turned.video.height, turned.video.width) == (96, 72)
    wanted = np.rot90(pan(), -1, axes=(1, 2))  # a quarter turn clockwise, as the container says
    assert far(read(turned, (96, 72)), wanted) < 4
    (rows, columns), (top, left) = fit(turned.video, turned.box, (48, 64))
    small = read(turned, (48, 64))
    scaled = np.stack([cv2.resize(f, (columns, rows), interpolation=cv2.INTER_AREA) for f in wanted])
    assert far(small, scaled[:, top : top + 48, left : left + 64]) < 4


def test_a_variable_rate_becomes_a_constant_one(tmp_path):
    """Where the picture stands says when it was taken."""
    times = np.sort(np.random.default_rng(1).uniform(0, 2, FRAMES))
    write_video(tmp_path / "variable.mkv", pan(), times=np.unique(np.round(times, 3)))
    config = CurateConfig(
        source=str(tmp_path), out="unused", fps=12.0, rate="exact", pose=PoseConfig(focal=0.8)
    )
    config = dataclasses.replace(config, split=dataclasses.replace(config.split, min_frames=10))
    (clip,) = stages.scan(config, ingest(config)).clips
    frames = read(clip, (72, 96)).astype(int)
    nearest = [np.abs(frames[k] - pan()).mean((1, 2, 3)).argmin() for k in range(len(frames))]
    wanted = [
        np.abs(np.unique(np.round(times, 3)) - clip.start - k / 12.0).argmin() for k in range(len(frames))
    ]
    assert np.abs(np.array(nearest) - wanted).max() <= 1 and len(frames) > 15
    assert read(clip, (72, 96)).tobytes() == read(clip, (72, 96)).tobytes()


@pytest.mark.parametrize(("rate", "fps"), [(24, 12.0), (30, 15.0), (16, 16.0)])
def test_every_nth_picture_is_taken(rate, fps, tmp_path):
    write_video(tmp_path / "v.mkv", pan(), fps=rate)
    config = CurateConfig(source=str(tmp_path), out="unused", size=(72, 96), pose=PoseConfig(focal=0.8))
    config = dataclasses.replace(config, split=dataclasses.replace(config.split, min_frames=9))
    (clip,) = stages.scan(config, ingest(config)).clips
    assert abs(clip.fps - fps) < 0.01 and clip.frames == len(pan()[:: round(rate / fps)])
    frames = read(clip, (72, 96)).astype(int)
    nearest = [int(np.abs(f - pan()).mean((1, 2, 3)).argmin()) for f in frames]
    assert nearest == list(range(0, FRAMES, round(rate / fps)))


def test_sources_that_are_missing_or_no_list_are_refused(tmp_path, config):
    with pytest.raises(ConfigError, match="config.source"):
        ingest(dataclasses.replace(config, source=str(tmp_path / "nowhere")))
    (tmp_path / "list.txt").write_text("a.mp4\n")
    with pytest.raises(ConfigError, match="a.mp4: no such file"):
        ingest(dataclasses.replace(config, source=str(tmp_path / "list.txt")))


@functools.cache
def seed_videos() -> dict[str, bytes]:
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("mp4", "mkv", "avi", "ts"):
            path = pathlib.Path(folder, f"v.{kind}")
            write_video(path, pan(64, 64)[:20], codec="mpeg4" if kind == "avi" else "libx264")
            made[kind] = path.read_bytes()
    return made


MUTATIONS = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=12)), max_size=8)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(("mp4", "mkv", "avi", "ts")), changes=MUTATIONS, end=st.floats(0.02, 1))
def test_mutated_bytes_are_a_video_or_a_reason(kind, changes, end):
    data = bytearray(seed_videos()[kind])
    for place, values in changes:
        at = int(place * (len(data) - len(values)))
        data[at : at + len(values)] = values
    config = CurateConfig(source="unused", out="unused", size=(48, 64))
    config = dataclasses.replace(config, split=dataclasses.replace(config.split, min_frames=8))
    with tempfile.NamedTemporaryFile(suffix=f".{kind}") as file:
        file.write(data[: int(end * len(data))])
        file.flush()
        try:
            video = probe(config, Video(file.name, "v", max(1, int(end * len(data)))))
            clips, _ = split(config, video)
            for clip in clips:
                assert read(clip, (48, 64)).shape == (clip.frames, 48, 64, 3)
        except Rejected as reason:
            assert reason.reason
