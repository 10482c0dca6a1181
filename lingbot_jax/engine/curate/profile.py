"""What a clip looks like: measured attributes, bars, black, blurred and frozen frames, hashes (paper section 2.2.2)."""

import dataclasses

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from lingbot_jax.engine.curate.config import CurateConfig
from lingbot_jax.engine.curate.frames import Frames, Grey, analysed, fit, grey_of, read
from lingbot_jax.engine.curate.items import Clip, Rejected

_DARK = 24  # luma of a bar's brightest pixel: black is 16 in video, and codecs ring
_MOST = 0.35  # share of a side that one bar may cover: more is a dark picture
_SAME = 0.35  # grey levels that repeated frames differ by on average: what encoding alone does
_SMALL = 64  # pixels across, for motion


def bars(grey: Grey) -> tuple[float, float, float, float]:
    """Top, bottom, left, right of what lies inside black bars that never change, as shares."""

    def edges(bright: UInt8[np.ndarray, "n"]) -> tuple[float, float]:
        lit, n = np.flatnonzero(bright > _DARK), len(bright)
        if not len(lit):
            return 0.0, 1.0
        low, high = int(lit[0]), int(lit[-1]) + 1
        # A pixel more than is dark: scaling has mixed the border.
        low, high = low + (low > 0), high - (high < n)
        return (low / n, high / n) if max(low, n - high) <= _MOST * n else (0.0, 1.0)

    lightest = grey.max(axis=0)
    return *edges(lightest.max(axis=1)), *edges(lightest.max(axis=0))


def sharpness(grey: Grey) -> Float[np.ndarray, "f"]:
    """The strongest hundredth of the gradients of each frame, in its contrast (standard deviation) per pixel.

    An edge over one pixel gives about 1 or more, one over ten pixels a tenth; flat frames have 0.
    """
    found = []
    for picture in grey:
        x = cv2.Scharr(picture, cv2.CV_32F, 1, 0, scale=1 / 32)
        y = cv2.Scharr(picture, cv2.CV_32F, 0, 1, scale=1 / 32)
        contrast = float(picture.std())
        strong = float(np.percentile(cv2.magnitude(x, y)[2:-2, 2:-2], 99))
        found.append(strong / contrast if contrast > 2 else 0.0)
    return np.array(found)


def motion(grey: Grey) -> Float[np.ndarray, "f-1"]:
    """Mean optical flow into each frame but the first, in widths of the picture."""
    height, width = grey.shape[1:]
    small = [
        cv2.resize(g, (_SMALL, max(16, _SMALL * height // width)), interpolation=cv2.INTER_AREA) for g in grey
    ]
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
    search.setFinestScale(0)
    flows = (search.calc(a, b, None) for a, b in zip(small, small[1:], strict=False))
    return np.array([np.linalg.norm(flow, axis=-1).mean() / _SMALL for flow in flows])


def perceptual_hash(grey: UInt8[np.ndarray, "h w"]) -> int:
    """64 bits: the signs of the lowest frequencies but the mean, against their median."""
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].ravel()
    bits = low > np.median(low[1:])
    bits[0] = False
    return int(np.packbits(bits).view(">u8")[0])


def profile(config: CurateConfig, clip: Clip) -> Clip:
    """The clip without bars, and its attributes.

    Raises:
      Rejected: black, blurred or frozen, or it cannot be read.
    """
    whole = _uncut(config, clip)[:: max(1, clip.frames // 8)]
    clip = dataclasses.replace(clip, box=bars(grey_of(whole)))
    frames = analysed(clip, config.pose.width, config.size)
    grey = grey_of(frames)
    luma = grey.mean(axis=(1, 2))
    sharp, flow = sharpness(grey), motion(grey)
    black = float((luma < config.profile.black).mean())
    blurred = float((sharp < config.profile.blur).mean())
    same = np.array([cv2.absdiff(a, b).mean() for a, b in zip(grey, grey[1:], strict=False)]) < _SAME
    for share, most, reason in (
        (black, config.profile.max_black, "black"),
        (blurred, config.profile.max_blurred, "blurred"),
        (float(same.mean()), config.profile.max_frozen, "frozen"),
    ):
        if share > most:
            raise Rejected(reason, f"{share:.2f} of the frames")
    picked = (0, len(grey) // 2, len(grey) - 1)
    findings = {
        "brightness": round(float(luma.mean()), 2),
        "contrast": round(float(grey.std(axis=(1, 2)).mean()), 2),
        "sharpness": round(float(np.median(sharp)), 4),
        "motion": round(float(flow.mean()), 5),
        "frozen": round(float(same.mean()), 3),
        "hashes": [f"{perceptual_hash(grey[i]):016x}" for i in picked],
        "colour": [round(float(x), 1) for x in frames.mean(axis=(0, 1, 2))],
    }
    return clip.noted("profile", findings)


def _uncut(config: CurateConfig, clip: Clip) -> Frames:
    """The whole pictures: as they are looked at afterwards if nothing is cut off, else at most 320 wide or high."""
    if fit(clip.video, clip.box, config.size)[0] == config.size:
        return analysed(clip, config.pose.width, config.size)
    scale = min(1.0, 320 / max(clip.video.height, clip.video.width))
    return read(clip, (max(16, round(clip.video.height * scale)), max(16, round(clip.video.width * scale))))
