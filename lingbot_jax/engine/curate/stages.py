"""The stages in their order, each a pure function of a reference, and how one that fails ends: as a dropped row."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from lingbot_jax.engine.curate.caption import caption
from lingbot_jax.engine.curate.config import CurateConfig
from lingbot_jax.engine.curate.items import Clip, Rejected, Video
from lingbot_jax.engine.curate.keys import keys
from lingbot_jax.engine.curate.pose import camera, pose
from lingbot_jax.engine.curate.probe import probe
from lingbot_jax.engine.curate.profile import profile
from lingbot_jax.engine.curate.shots import split

STAGES = ("ingest", "probe", "split", "camera", "profile", "pose", "keys", "caption", "select", "write")
ON_CLIPS: tuple[tuple[str, Callable[[CurateConfig, Clip], Clip]], ...] = (
    ("profile", profile),
    ("pose", pose),
    ("keys", keys),
    ("caption", caption),
)


class Outcome:
    """What became of some files or clips.

    Attributes:
      clips: that go on. dropped: rows of dropped.jsonl. entered: how many each stage was given. cpu: its seconds.
    """

    def __init__(self):
        self.clips: list[Clip] = []
        self.dropped: list[dict[str, Any]] = []
        self.entered: dict[str, int] = {}
        self.cpu: dict[str, float] = {}

    def run(self, stage: str, of: Video | Clip, work: Callable[[], Any]) -> Any:
        """What `work()` returns; None where it fails, which is noted: no clip ends a run."""
        begin = time.thread_time()
        self.entered[stage] = self.entered.get(stage, 0) + 1
        try:
            return work()
        except Rejected as reason:
            self.drop(stage, of, reason)
        except Exception as error:  # whatever a library makes of hostile bytes
            self.drop(stage, of, Rejected("failed", f"{type(error).__name__}: {error}"))
        finally:
            self.cpu[stage] = self.cpu.get(stage, 0.0) + time.thread_time() - begin
        return None

    def drop(self, stage: str, of: Video | Clip, reason: Rejected) -> None:
        self.dropped.append(dropped_row(stage, of, reason))


def dropped_row(stage: str, of: Video | Clip, reason: Rejected) -> dict[str, Any]:
    """A row of dropped.jsonl: of a file, or of a range of one."""
    video = of.video if isinstance(of, Clip) else of
    row = {"stage": stage, "reason": reason.reason, "detail": reason.detail, "file": video.name}
    return row | ({"start": of.start, "frames": of.frames} if isinstance(of, Clip) else {})


def scan(config: CurateConfig, videos: Iterable[Video]) -> Outcome:
    """Probe, split, and a focal length for the clips of each video."""
    outcome = Outcome()
    for video in videos:
        probed = outcome.run("probe", video, lambda video=video: probe(config, video))
        if probed is None:
            continue
        found = outcome.run("split", probed, lambda probed=probed: split(config, probed))
        if found is not None:
            clips, short = found
            outcome.clips += outcome.run("camera", probed, lambda clips=clips: camera(config, clips)) or []
            for clip, reason in short:
                outcome.drop("split", clip, reason)
    return outcome


def annotate(config: CurateConfig, clips: Iterable[Clip]) -> Outcome:
    """Profile, pose, keys and captions, one clip after another."""
    outcome = Outcome()
    for clip in clips:
        for stage, function in ON_CLIPS:
            clip = outcome.run(stage, clip, lambda clip=clip, function=function: function(config, clip))
            if clip is None:
                break
        else:
            outcome.clips.append(clip)
    return outcome
