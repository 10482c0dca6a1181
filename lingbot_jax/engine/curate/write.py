"""Write: annotated clips as records of the schema, a shard at a time."""

from typing import Any

import numpy as np

from lingbot_jax.data.schema import Captions, Event, encode
from lingbot_jax.data.schema import Clip as Record
from lingbot_jax.engine.curate.config import CurateConfig
from lingbot_jax.engine.curate.frames import read
from lingbot_jax.engine.curate.items import Clip
from lingbot_jax.engine.curate.pose import intrinsics, poses_of


def record(config: CurateConfig, clip: Clip, split: str) -> bytes:
    """The bytes of a clip. Raises Rejected for frames that are missing, ClipError for what the schema refuses."""
    notes = clip.notes
    told = notes["caption"]
    captions = Captions(told["narrative"], told["static"], tuple(Event(**e) for e in told["temporal"]))
    extra: dict[str, Any] = {
        "file": clip.video.name,
        "start": clip.start,
        "box": list(clip.box),
        "profile": notes["profile"],
        "pose": {k: v for k, v in notes["pose"].items() if k != "c2w"},
        "keys": {k: v for k, v in notes["keys"].items() if k != "rows"},
        "temporal": told["dense"],
    }
    return encode(
        Record(
            frames=read(clip, config.size),
            keys=np.array([[c == "1" for c in row] for row in notes["keys"]["rows"]], np.uint8),
            c2w=poses_of(clip),
            intrinsics=np.tile(intrinsics(config, clip, notes["pose"]["focal"]), (clip.frames, 1)),
            timestamps=np.arange(clip.frames) / clip.fps,
            clip_id=clip.clip_id,
            source="video",
            split=split,
            map=clip.video.name,
            seed=config.select.seed,
            behaviour="curated",
            fps=clip.fps,
            captions=captions,
            extra=extra,
        )
    )
