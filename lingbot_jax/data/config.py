"""How to read a data set."""

from typing import Annotated

from pydantic import Field

from lingbot_jax.config import Count, Path, Seed, config


@config
class DataConfig:
    """Clips for training and evaluation. Which clip a step takes depends on path, frames, batch and seed alone."""

    path: Path = Field(description="folder of the data set, local or gs://")
    frames: Annotated[int, Field(gt=0, le=1_000_001)] = Field(
        33, description="video frames of a crop, 4n + 1 (33, 81)"
    )
    batch: Annotated[int, Field(gt=0, le=2**20)] = Field(16, description="clips per step, over all processes")
    seed: Seed = Field(0, description="of the order of clips and of the crops")
    max_bad_records: Count = Field(
        16, description="unreadable records and shards that are replaced before a run stops"
    )
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(
        1, description="that read and decode records; 0 reads when asked"
    )
    prefetch: Annotated[int, Field(gt=0, le=1024)] = Field(4, description="batches made ahead")
