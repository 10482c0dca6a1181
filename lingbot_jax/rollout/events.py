"""Prompt events of a script: `4.0s: it starts to snow; 9.0s+2.0s: fireworks` (paper section 5.1)."""

import dataclasses
import re

from lingbot_jax.config import require

LONGEST = 1e6  # seconds: no video is that long


@dataclasses.dataclass(frozen=True)
class Event:
    """From `second` on, for `seconds` (None: it stays), `text` joins the prompt."""

    second: float
    seconds: float | None
    text: str


def parse(script: str) -> tuple[Event, ...]:
    """Reads a script.

    Raises:
      ConfigError: names the event, counted from 1, and what is expected; or they are not in order.
    """
    events: list[Event] = []
    for i, line in enumerate(filter(str.strip, script.split(";")), 1):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)s(?:\+(\d+(?:\.\d+)?)s)?\s*:\s*(\S.*?)\s*", line, re.DOTALL)
        require(
            found is not None,
            f"events, event {i}",
            line.strip(),
            "expected <second>s: <text>, or <second>s+<seconds>s: <text> for a passing one",
        )
        event = Event(float(found[1]), None if found[2] is None else float(found[2]), found[3])
        short = max(event.second, event.seconds or 0.0) <= LONGEST
        require(short, f"events, event {i}", line.strip(), f"no time is over {LONGEST:g} seconds")
        ordered = not events or events[-1].second <= event.second
        require(ordered, f"events, event {i}", line.strip(), "is earlier than the one before it")
        events.append(event)
    return tuple(events)
