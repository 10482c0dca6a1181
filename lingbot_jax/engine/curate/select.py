"""Select: near-duplicates across the whole set, target shares, and which videos are held out."""

import dataclasses
import hashlib
from typing import Any

from lingbot_jax.engine.curate.config import LEVELS, CurateConfig, SelectConfig
from lingbot_jax.engine.curate.items import Rejected, from_json


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the choice looks at: a clip in some tens of bytes; `at` says where the rest is."""

    clip_id: str
    video: str
    hashes: tuple[int, int, int]
    values: dict[str, float]
    at: tuple[str, int]

    def level(self, attribute: str) -> str:
        low, high = LEVELS[attribute]
        value = self.values[attribute]
        return "low" if value < low else "medium" if value < high else "high"


def duplicates(summaries: list[Summary], bits: int) -> dict[str, str]:
    """Clip -> the clip before it (by name) that it repeats: all three hashes differ in at most `bits` bits.

    Of hashes that differ in so few, one of bits + 1 pieces is equal: only clips that share a piece are compared.
    """
    pieces = bits + 1
    bounds = [64 * i // pieces for i in range(pieces + 1)]
    buckets: dict[tuple[int, int], list[Summary]] = {}
    found: dict[str, str] = {}
    for one in sorted(summaries, key=lambda s: s.clip_id):
        middle = one.hashes[1]
        keys = [
            (i, (middle >> a) & ((1 << (b - a)) - 1))
            for i, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))
        ]
        same = lambda other, one=one: all(
            (a ^ b).bit_count() <= bits for a, b in zip(one.hashes, other.hashes, strict=True)
        )
        first = next((other for key in keys for other in buckets.get(key, ()) if same(other)), None)
        if first is not None:
            found[one.clip_id] = first.clip_id
            continue
        for key in keys:
            buckets.setdefault(key, []).append(one)
    return found


def _rank(config: SelectConfig, text: str) -> str:
    return hashlib.sha256(f"{config.seed}/{text}".encode()).hexdigest()


def _too_many(config: SelectConfig, summaries: list[Summary]) -> dict[str, str]:
    """Clip -> why it is one too many: of each attribute in turn, what exceeds its target share; then the count.

    The largest set whose shares are the targets is as large as the scarcest level allows.
    """
    left = sorted(summaries, key=lambda s: _rank(config, s.clip_id))
    out: dict[str, str] = {}
    for attribute, targets in sorted(config.shares.items()):
        whole = sum(targets.values())
        have = {
            level: [s for s in left if s.level(attribute) == level] for level in ("low", "medium", "high")
        }
        # A level that is wanted and not there at all cannot be reached: it does not empty the rest.
        wanted = {level: share / whole for level, share in targets.items() if share > 0}
        total = min((len(have[level]) / share for level, share in wanted.items() if have[level]), default=0.0)
        kept = []
        for level, clips in have.items():
            room = round(total * wanted.get(level, 0.0))
            kept += clips[:room]
            out |= {s.clip_id: f"{attribute} {level}" for s in clips[room:]}
        left = sorted(kept, key=lambda s: _rank(config, s.clip_id))
    if config.clips:
        out |= {s.clip_id: f"more than {config.clips} clips" for s in left[config.clips :]}
    return out


def select(
    config: CurateConfig, summaries: list[Summary]
) -> tuple[dict[str, list[Summary]], dict[str, Rejected]]:
    """The clips of each split in order, and why the others are left out, by clip."""
    out = {
        k: Rejected("near-duplicate", f"of {v}")
        for k, v in duplicates(summaries, config.select.duplicates).items()
    }
    left = [s for s in summaries if s.clip_id not in out]
    out |= {k: Rejected("over target share", v) for k, v in _too_many(config.select, left).items()}
    left = sorted((s for s in left if s.clip_id not in out), key=lambda s: s.clip_id)
    videos = sorted({s.video for s in left}, key=lambda v: _rank(config.select, v))
    count = round(config.select.held_out * len(videos))
    if config.select.held_out and len(videos) > 1:
        count = min(max(count, 1), len(videos) - 1)  # neither split is empty where it can be helped
    held = set(videos[:count])
    splits = {
        "train": [s for s in left if s.video not in held],
        "held_out": [s for s in left if s.video in held],
    }
    return splits, out


def reached(summaries: list[Summary]) -> dict[str, dict[str, float]]:
    """Shares of the levels of each attribute."""
    shares: dict[str, dict[str, float]] = {}
    for attribute in LEVELS:
        levels = [s.level(attribute) for s in summaries]
        shares[attribute] = {
            k: round(levels.count(k) / max(1, len(levels)), 3) for k in ("low", "medium", "high")
        }
    return shares


def summary(clip: dict[str, Any], at: tuple[str, int]) -> Summary:
    """Of a clip's row in a part file."""
    one = from_json(clip)
    notes = one.notes
    values = {
        "motion": notes["profile"]["motion"],
        "brightness": notes["profile"]["brightness"],
        "turning": notes["pose"]["turning"],
    }
    hashes = tuple(int(h, 16) for h in notes["profile"]["hashes"])
    return Summary(one.clip_id, one.video.name, hashes, values, at)
