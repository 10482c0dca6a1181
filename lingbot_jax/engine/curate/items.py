"""What goes from stage to stage: references and what is known of them, never frames. All of it is JSON."""

import dataclasses
from typing import Any


class Rejected(Exception):
    """A file or clip that goes no further: `reason` is one of few fixed texts, `detail` is about this one."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, " ".join(detail.split())[:300]


@dataclasses.dataclass(frozen=True)
class Video:
    """A video file as probed.

    Attributes:
      path: absolute. name: below the source. nbytes: of the file.
      height, width: as shown: turned, with square pixels. rotation: quarter turns counter-clockwise.
      rate: usual pictures per second. start, end: seconds of the first and last picture.
    """

    path: str
    name: str
    nbytes: int
    codec: str = ""
    height: int = 0
    width: int = 0
    rotation: int = 0
    rate: float = 0.0
    start: float = 0.0
    end: float = 0.0


@dataclasses.dataclass(frozen=True)
class Clip:
    """`frames` pictures of a video at a constant rate from `start` seconds on; and what the stages have said.

    Attributes:
      box: top, bottom, left, right of what is looked at, as shares of the picture shown.
      notes: stage -> its findings.
    """

    video: Video
    start: float
    frames: int
    fps: float
    box: tuple[float, float, float, float] = (0.0, 1.0, 0.0, 1.0)
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def clip_id(self) -> str:
        """Unique in the source."""
        return f"{self.video.name}@{self.start:.3f}+{self.frames}"

    def noted(self, stage: str, findings: dict[str, Any]) -> "Clip":
        return dataclasses.replace(self, notes={**self.notes, stage: findings})


def to_json(clip: Clip) -> dict[str, Any]:
    return dataclasses.asdict(clip)


def from_json(values: dict[str, Any]) -> Clip:
    return Clip(**(values | {"video": Video(**values["video"]), "box": tuple(values["box"])}))
