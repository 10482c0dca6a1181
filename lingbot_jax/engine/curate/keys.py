"""Keys from poses: the inverse of `keyboard.integrate`, with how certain it is."""

import numpy as np

from lingbot_jax.control.keyboard import STEP, keys_from_poses, motions
from lingbot_jax.engine.curate.config import CurateConfig
from lingbot_jax.engine.curate.items import Clip, Rejected
from lingbot_jax.engine.curate.pose import poses_of

_MARGIN = 0.3  # of a threshold: what lies as near to it could as well be the other


def keys(config: CurateConfig, clip: Clip) -> Clip:
    """The clip with the keys that explain its path: `rows` of eight 0 or 1 per frame, and the share of certain frames.

    Raises:
      Rejected: too few are certain.
    """
    c2w, least = poses_of(clip), (config.keys.move * STEP, config.keys.turn, config.keys.pitch)
    rows = keys_from_poses(c2w, *least)
    confidence = float(certain(c2w, *least)[1:].mean())
    if confidence < config.keys.min_confidence:
        raise Rejected("keys uncertain", f"in {1 - confidence:.2f} of the frames")
    texts = ["".join("1" if down else "0" for down in row) for row in rows]
    return clip.noted("keys", {"rows": texts, "confidence": round(confidence, 3)})


def certain(c2w: np.ndarray, move: float, yaw: float, pitch: float) -> np.ndarray:
    """Whether no motion into a frame lies near a threshold of `keys_from_poses`."""
    shares = (value / least for value, least in zip(motions(c2w), (move, move, yaw, pitch), strict=True))
    return np.all([np.abs(np.abs(share) - 1) > _MARGIN for share in shares], axis=0)
