"""How to read a data set."""

from typing import Annotated

from pydantic import Field

from lingbot_jax.config import Count, Path, Seed, config, require

Weight = Annotated[float, Field(ge=1e-3, le=1e3, allow_inf_nan=False)]


@config
class MixtureConfig:
    """One data set of several."""

    path: Path = Field(description="its folder, local or gs://")
    weight: Weight = Field(
        1.0, description="of it among all weights: the share of the clips that are from it"
    )


@config
class DataConfig:
    """Clips for training and evaluation. Which a step takes depends on paths, weights, frames, batch and seed alone."""

    path: Path = Field(
        description="folder of the data set, local or gs://; of several, the one whose held-out clips are measured"
    )
    weight: Weight = Field(1.0, description="of path, where there is a mixture")
    mixture: tuple[MixtureConfig, ...] = Field(
        (),
        description="data sets beside path, each a path and a weight: clips are from all, in shares of the weights",
    )
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

    def __post_init__(self):
        ok = self.mixture or self.weight == 1.0
        require(ok, "weight", self.weight, "means nothing without a mixture")

    def parts(self) -> tuple[MixtureConfig, ...]:
        """All data sets, `path` first."""
        return (MixtureConfig(path=self.path, weight=self.weight), *self.mixture)
