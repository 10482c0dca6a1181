"""Captions of paper section 2.3 from what was measured, and what a caption of each kind must hold to."""

import itertools
import re
from typing import Any

import numpy as np

from lingbot_jax.engine.collect.captions import phrase
from lingbot_jax.engine.collect.walk import KEYS
from lingbot_jax.engine.curate.config import CurateConfig
from lingbot_jax.engine.curate.items import Clip, Rejected

_SHORT = 3  # frames: what is held for less belongs to what was before
_MOTION = re.compile(
    r"\b(mov(e|es|ed|ing|ement)|motion|walk\w*|run(s|ning)?|turn\w*|rotat\w*|pan(s|ned|ning)?|tilt\w*|zoom\w*|glid\w*"
    r"|step(s|ped|ping)?|forwards?|backwards?|advanc\w*|retreat\w*|approach\w*|pass(es|ing)|follow\w*|drift\w*|fly\w*|flies"
    r"|driv\w*|rid(e|es|ing)|looks? (up|down|left|right)|travel\w*|circl(es|ing)|shift\w*|then)\b",
    re.IGNORECASE,
)


def check_static(text: str) -> None:
    """Raises Rejected for a caption of the place that says something of motion (action-decoupled, section 2.3)."""
    found = _MOTION.search(text)
    if found:
        raise Rejected("static caption with motion", repr(found[0]))


def check_temporal(events: list[dict[str, Any]], seconds: float) -> None:
    """Raises Rejected unless events of the camera cover 0 .. `seconds` one after another, none empty."""
    at = 0.0
    for event in events:
        if abs(event["start"] - at) > 1e-6 or event["end"] <= event["start"] or not event["text"].strip():
            raise Rejected("temporal captions with a gap or an overlap", f"at {at:.3f} s")
        at = event["end"]
    if abs(at - seconds) > 1e-6:
        raise Rejected("temporal captions with a gap or an overlap", f"end at {at:.3f} of {seconds:.3f} s")


def dense(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events in the paper's form: start_time, end_time, Event (a name) and caption."""
    named = lambda e: re.sub(r"^The camera ", "", e["text"]).rstrip(".")
    return [
        {"start_time": e["start"], "end_time": e["end"], "Event": named(e), "caption": e["text"]}
        for e in events
    ]


def _runs(rows: list[str]) -> list[tuple[str, int]]:
    """Names of held keys and for how many transitions, without short ones."""
    held = ["".join(k for k, c in zip(KEYS, row, strict=True) if c == "1") for row in rows[1:]]
    runs: list[list] = []
    for name, run in itertools.groupby(held):
        count = len(list(run))
        if runs and (count < _SHORT or runs[-1][0] == name):
            runs[-1][1] += count
        else:
            runs.append([name, count])
    return [(name, count) for name, count in runs]


def _tone(colour: list[float]) -> str:
    red, green, blue = colour
    low, high = min(colour), max(colour)
    if high - low < 0.12 * max(high, 1.0):
        return "grey"
    names = ((red, "reddish"), (green, "greenish"), (blue, "bluish"))
    if min(red, green) - blue > 0.6 * (high - low):
        return "yellowish"
    return max(names)[1]


def static(profile: dict[str, Any]) -> str:
    light = (
        "dark" if profile["brightness"] < 60 else "bright" if profile["brightness"] > 150 else "softly lit"
    )
    contrast = "strong" if profile["contrast"] > 55 else "little" if profile["contrast"] < 25 else "moderate"
    return f"A {light} scene in {_tone(profile['colour'])} tones with {contrast} contrast."


def caption(config: CurateConfig, clip: Clip) -> Clip:
    """The clip with captions made from its profile and its keys.

    Raises:
      Rejected: one is not what its kind must be.
    """
    scene = static(clip.notes["profile"])
    runs = _runs(clip.notes["keys"]["rows"])
    times = np.arange(clip.frames) / clip.fps
    events, at = [], 0
    for name, count in runs:
        events.append(
            {
                "start": float(times[at]),
                "end": float(times[at + count]),
                "text": f"The camera {phrase(name)}.",
                "kind": "camera",
            }
        )
        at += count
    story = ", then ".join(phrase(name) for name, _ in runs)
    check_static(scene)
    check_temporal(events, float(times[-1]))
    told = {"narrative": f"{scene} The camera {story}.", "static": scene, "temporal": events}
    return clip.noted("caption", told | {"dense": dense(events)})
