"""Keys from poses: the inverse of `keyboard.integrate`, with how certain it is."""

import numpy as np

from lingbot_jax.control.keyboard import STEP, elevation, headings, keys_from_poses
from lingbot_jax.engine.curate.config import CurateConfig
from lingbot_jax.engine.curate.items import Clip, Rejected

_MARGIN = 0.3  # of a threshold: what lies as near to it could as well be the other


def keys(config: CurateConfig, clip: Clip) -> Clip:
    """The clip with the keys that explain its path: `rows` of eight 0 or 1 per frame, and the share of certain frames.

    Raises:
      Rejected: too few are certain.
    """
    c2w = np.tile(np.eye(4), (clip.frames, 1, 1))
    c2w[:, :3] = np.array(clip.notes["pose"]["c2w"]).reshape(-1, 3, 4)
    rows = keys_from_poses(c2w, config.keys.move * STEP, config.keys.turn, config.keys.pitch)
    confidence = float(certain(c2w, config.keys.move * STEP, config.keys.turn, config.keys.pitch)[1:].mean())
    if confidence < config.keys.min_confidence:
        raise Rejected("keys uncertain", f"in {1 - confidence:.2f} of the frames")
    texts = ["".join("1" if down else "0" for down in row) for row in rows]
    return clip.noted("keys", {"rows": texts, "confidence": round(confidence, 3)})


def certain(c2w: np.ndarray, move: float, yaw: float, pitch: float) -> np.ndarray:
    """Whether no motion into a frame lies near a threshold of `keys_from_poses`."""
    rotation = c2w[:, :3, :3]
    forward, right = headings(rotation)
    moved = np.diff(c2w[:, :3, 3], axis=0, prepend=c2w[:1, :3, 3])
    heading = np.degrees(np.arctan2(forward[:, 0], forward[:, 2]))
    turned = (np.diff(heading, prepend=heading[:1]) + 180) % 360 - 180
    rise = np.degrees(np.diff(elevation(rotation), prepend=elevation(rotation[:1])))
    values = ((moved * forward).sum(1) / move, (moved * right).sum(1) / move, turned / yaw, rise / pitch)
    return np.all([np.abs(np.abs(v) - 1) > _MARGIN for v in values], axis=0)
