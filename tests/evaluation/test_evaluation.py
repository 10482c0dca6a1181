"""Measures against closed forms, and files that other programs can read."""

import av
import numpy as np

from lingbot_jax.data.video import contact_sheet, write_image, write_mp4
from lingbot_jax.evaluation.action_following import median_flow, yaw_signs
from lingbot_jax.evaluation.report import Report
from lingbot_jax.evaluation.video import clip_psnr, frame_psnr


def panning(shift: float, frames: int = 17) -> np.ndarray:
    """A smooth picture that moves right by `shift` pixels a frame."""
    y, x = np.mgrid[0:48, 0:64]
    picture = lambda dx: np.sin((x - dx) / 5.0) + np.sin((x - dx) / 3.1 + y / 7.0)
    grey = np.stack([picture(shift * f) for f in range(frames)])
    return ((grey[..., None] + 2) / 4 * 255).repeat(3, -1).astype(np.uint8)


def test_psnr_closed_form():
    a = np.zeros((2, 4, 8, 8, 3), np.uint8)
    b = a.copy()
    b[0, 1] = 51  # error 0.2 in one of four frames
    assert np.isclose(frame_psnr(a, b)[0, 1], -20 * np.log10(0.2))
    assert np.isclose(clip_psnr(a, b)[0], -10 * np.log10(0.04 / 4))
    assert np.isclose(clip_psnr(a, b)[1], 100)


def test_flow_and_yaw_signs_follow_the_picture():
    for shift in (-2.5, 0.5, 1.0):
        assert np.abs(np.median(median_flow(panning(shift))[1:], axis=0) - [shift, 0]).max() < 0.2
    keys = np.zeros((17, 8), np.uint8)
    keys[1:, 5] = 1  # J: turns left, the picture moves right
    assert yaw_signs(panning(1.0), keys) == (4, 4)
    assert yaw_signs(panning(-1.0), keys) == (0, 4)
    keys[1:9, 1] = 1  # A moves the picture too: those spans say nothing
    assert yaw_signs(panning(1.0), keys) == (2, 2)


def test_mp4_plays_and_starts_at_once(tmp_path):
    path = tmp_path / "v.mp4"
    write_mp4(path, panning(1.0), fps=16.0, scale=2)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
        assert (
            stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p" and stream.average_rate == 16
        )
    assert np.abs(np.stack(frames)[:, ::2, ::2].astype(int) - panning(1.0)).mean() < 6
    data = path.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat"), "the index comes first"
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


def test_sheet_and_report(tmp_path):
    sheet = contact_sheet([("a", panning(1.0)), ("b", panning(2.0))], columns=5, scale=1)
    write_image(tmp_path / "s.png", sheet)
    assert sheet.shape[0] == 2 * 52 + 4
    report = Report("<title>", "lead")
    report.cards([("+2.0 dB", "gain", True)])
    report.table(["measure", "value"], [["a<b", "-1.5 dB"]])
    report.image("s.png", "sheet")
    report.write(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "&lt;title&gt;" in page and "a&lt;b" in page and "class=number" in page
