"""What post-training is worth: the teacher, the causal model before and after distillation, on held-out clips.

python -m experiments.compare --config=experiments/configs/tiny.py:compare

The teacher samples windows with many steps; the others play chunk after chunk with few. Writes a folder:
post_training.json (model, time: PSNR, sharpness, action following; drift over long play; frames per second), and
compared.mp4 and sheet.png (truth, then each model, side by side).
"""

import json
import pathlib
import time

from rich.console import Console
from rich.progress import Progress

from experiments import common
from experiments.configs.schema import CompareConfig
from lingbot_jax.config import ConfigError
from lingbot_jax.data.config import DataConfig
from lingbot_jax.data.video import contact_sheet, write_image, write_mp4
from lingbot_jax.evaluation import rollouts
from lingbot_jax.evaluation.post_training import compare
from lingbot_jax.evaluation.suite import held_out_clips, side_by_side
from lingbot_jax.training.run_dir import load_config
from lingbot_jax.worlds.open import open_world

CONFIG = common.define_config(CompareConfig)
MODELS = ("teacher", "causal", "distilled")


def main() -> None:
    config = common.load(CONFIG, CompareConfig)
    out = pathlib.Path(config.out)
    common.check_writable(out, "config.out")
    data = DataConfig(config.path, frames=config.frames, batch=config.clips)
    clips = rollouts.steady(held_out_clips(data, config.found))
    clips = {name: values[: config.clips] for name, values in clips.items()}
    have = len(clips["frames"])
    if have < config.clips:
        raise ConfigError(
            f"config.clips = {config.clips}: of the first {config.found} held-out clips {have} have a scene that stays"
        )
    runs = {"teacher": config.teacher, "causal": config.causal, "distilled": config.distilled}
    worlds = {name: open_world(run, field=f"config.{name}") for name, run in runs.items()}
    trained = load_config(config.teacher).data.frames
    made, rates, played = {}, {}, {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for name, world in worlds.items():
            bar = progress.add_task(name, total=None)
            advance = lambda bar=bar: progress.advance(bar)
            run = lambda part, world=world, advance=advance, name=name: (
                rollouts.sample_long(world, part, trained, config.overlap, advance)
                if name == "teacher"
                else rollouts.play(world, part, advance)
            )
            run({key: values[:1] for key, values in clips.items()})  # compiles
            began = time.monotonic()
            videos = run(clips)
            rates[name] = videos.shape[0] * (videos.shape[1] - 1) / (time.monotonic() - began)
            made[name] = rollouts.as_clips(videos, clips)
            if name != "teacher":
                few = {key: values[: config.plays] for key, values in clips.items()}
                played[name] = rollouts.wander(world, few, config.seconds, config.fps, advance)
    stride = worlds["causal"].config.codec.stride
    found = compare(made, clips["frames"], config.fps, tuple(stride[1:]), played)
    numbers = {
        "post_training": found.table,
        "looks": found.looks,
        "drift": found.drift,
        "frames_per_second": rates,
        "clips": config.clips,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "post_training.json").write_text(json.dumps(numbers, indent=2) + "\n")
    shown = [clips["frames"][: config.shown], *(made[name].videos[: config.shown] for name in MODELS)]
    write_mp4(out / "compared.mp4", side_by_side(shown), config.fps, 3)
    rows = [
        (f"{i} {name}", videos[i])
        for i in range(config.shown)
        for name, videos in zip(("truth", *MODELS), shown, strict=True)
    ]
    rows += [(f"{name}, {config.seconds:g} s", clip.videos[0]) for name, clip in played.items()]
    write_image(out / "sheet.png", contact_sheet(rows, columns=9))
    print(json.dumps(numbers))


if __name__ == "__main__":
    common.run(main)
