"""Turns a folder of videos into a data set of training clips with poses, keys and captions (docs/curation.md).

    python -m experiments.curate --config=experiments/configs/curate.py --config.source=FOLDER --config.out=DIR

Run it again to go on where it stopped, or after files were added. The last line of stdout is one JSON object: clips_in,
kept, dropped (stage, reason, count), shares, cpu_seconds. Needs the extra `data`.
"""

import json

from absl import flags

from experiments import common
from lingbot_jax.engine.curate.config import CurateConfig

CONFIG = common.define_config(CurateConfig)
_RUNNER = flags.DEFINE_string("runner", None, "of Apache Beam, e.g. FlinkRunner; default: on this machine")
_BEAM = flags.DEFINE_multi_string(
    "beam", [], "an option of that runner, e.g. --beam=--flink_master=host:8081"
)


def main() -> None:
    config = common.load(CONFIG, CurateConfig)
    common.need("data", "apache_beam", "av", "cv2", "poselib", "scenedetect", "array_record")
    from lingbot_jax.engine.curate.pipeline import curate

    print(json.dumps(curate(config, _RUNNER.value, _BEAM.value)))


if __name__ == "__main__":
    common.run(main)
