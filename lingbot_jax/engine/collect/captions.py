"""Captions from what the recorder knows: keys and places (paper section 2.3's three layers)."""

import itertools

import numpy as np

from lingbot_jax.data.schema import Captions, Event
from lingbot_jax.engine.collect.walk import KEYS

_MOVES = {"W": "walks forward", "S": "walks backward", "A": "steps to the left", "D": "steps to the right"}
_TURNS = {"J": "turns left", "L": "turns right", "I": "looks up", "K": "looks down"}


def phrase(keys: str) -> str:
    """What the camera does while `keys` are held: phrase("WJ") = "walks forward and turns left"."""
    words = [text for key, text in (_MOVES | _TURNS).items() if key in keys]
    return " and ".join(words) or "stands still"


def describe(keys: np.ndarray, timestamps: np.ndarray, places: list[str]) -> Captions:
    """Captions of a clip.

    Args:
      keys: [f 8], row i led into frame i. timestamps: [f] seconds. places: where the player is, a frame.
    """
    held = ["".join(k for k, down in zip(KEYS, row, strict=True) if down) for row in keys[1:]]
    events, start = [], 0
    for name, run in itertools.groupby(held):
        end = start + len(list(run))
        events.append(Event(float(timestamps[start]), float(timestamps[end]), f"The camera {phrase(name)}."))
        start = end
    seen = list(dict.fromkeys(places))
    static = "First-person view of " + ", next to ".join(seen) + "."
    story = ", then ".join(phrase(name) for name, _ in itertools.groupby(held)) or "stands still"
    end = f", and ends in {places[-1]}." if places[-1] != places[0] else "."
    narrative = f"In {places[0]}, the camera {story}{end}"
    return Captions(narrative, static, tuple(events))
