"""Generates held-out clips and measures them: against the truth, with another clip's keys, by action following.

python -m experiments.evaluate --config=experiments/configs/tiny.py:evaluate
python -m experiments.evaluate --config=experiments/configs/tiny.py:evaluate --config.run=BUNDLE \
    --config.data.path=DATA --config.data.frames=81 --config.out=OUT

A run is measured on the data, at the size and the length that it was trained with. Writes a folder: evaluation.json,
sheet.png, and generated.mp4 (truth, generated, and the same world under other keys, side by side).
"""

import json
import pathlib

from rich.progress import track

from experiments import common
from experiments.configs.schema import EvaluateConfig
from lingbot_jax.config import ConfigError
from lingbot_jax.data.config import DataConfig
from lingbot_jax.data.video import contact_sheet, write_image, write_mp4
from lingbot_jax.evaluation.suite import Measured, evaluate_world, held_out_clips, side_by_side
from lingbot_jax.rollout.generate import chosen_sample
from lingbot_jax.rollout.sample import sample_config
from lingbot_jax.training.run_dir import load_config
from lingbot_jax.worlds.open import Source, find, open_world

CONFIG = common.define_config(EvaluateConfig)


def clips_of(config: EvaluateConfig, source: Source) -> tuple[DataConfig, tuple[int, int]]:
    """The data to measure on, and the size of its clips."""
    chosen = config.data
    if source.run:
        run = load_config(source.path)
        path, frames, size = run.data.path, run.data.frames, run.size
    else:
        path = frames = None
        size = (0, 0)
    values = {"path": chosen.path or path, "frames": chosen.frames or frames}
    for name, value in values.items():
        if value is None:
            raise ConfigError(
                f"config.data.{name} = None: {config.run} is a bundle, which has no data; give one"
            )
    return DataConfig(batch=config.batch, **values), chosen.size or size


def main() -> None:
    config = common.load(CONFIG, EvaluateConfig)
    out = pathlib.Path(config.out)
    common.check_writable(out, "config.out")
    source = find(config.run, "config.run")
    given = {name: getattr(config, name) for name in ("steps", "shift", "solver", "guidance")}
    sample = chosen_sample(sample_config(source.config, f"config.run = {config.run!r}"), **given)
    data, size = clips_of(config, source)
    clips = held_out_clips(data, config.clips, size, config.data.split)
    world = open_world(config.run, dtype=config.dtype, field="config.run")
    measured = evaluate_world(world, clips, sample, batch=config.batch, seed=config.seed, track=track)
    write(out, measured, config.shown)
    print(json.dumps(measured.numbers, indent=2))


def write(out: pathlib.Path, measured: Measured, shown: int) -> None:
    """The result folder."""
    names = ("truth", "true_keys", "other_keys")
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        (f"{i} {name.replace('_', ' ')}", measured.videos[name][i]) for i in range(shown) for name in names
    ]
    write_image(out / "sheet.png", contact_sheet(rows, columns=9))
    write_mp4(out / "generated.mp4", side_by_side([measured.videos[name][:shown] for name in names]), 8.0, 3)
    results = measured.numbers | {"psnr_by_frame": measured.by_frame}
    (out / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    common.run(main)
