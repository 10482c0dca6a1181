"""Makes the same clips as the game's source, slowly: a collector can be killed before it is done."""

import time
from pathlib import Path

from lingbot_jax.data.schema import Clip
from lingbot_jax.engine.collect.collector import configured_source
from lingbot_jax.engine.collect.config import CollectConfig
from lingbot_jax.engine.collect.source import Shard, Source, Task


class SlowSource:
    def __init__(self, source: Source):
        self._source = source

    def record(self, task: Task) -> Clip:
        time.sleep(0.5)
        return self._source.record(task)

    def close(self) -> None:
        self._source.close()


def slow_source(config: CollectConfig, work: Path, shard: Shard) -> SlowSource:
    return SlowSource(configured_source(config, work, shard))
