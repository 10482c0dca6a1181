"""Generates a video from a trained world: first frame + keys (or recorded poses) + prompt -> MP4.

python -m experiments.generate --run=runs/demo/action --image=door.png --keys=w-20,wl-12 --prompt="a hall" \
    --out=runs/demo/clip

--mode=base samples the whole clip at once with many steps; --mode=fast generates chunk after chunk with few
steps and takes prompt events. Writes a folder: video.mp4, poses.npy and keys.npy (one row per frame), and
generation.json, whose `command` makes the same video again. The folder appears when everything in it is
complete, or not at all. docs/generation.md explains the flags.
"""

import hashlib
import pathlib
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import common
from lingbot_jax.files import whole_folder
from lingbot_jax.rollout import generate
from lingbot_jax.rollout.generate import GenerateConfig
from lingbot_jax.worlds.open import find, open_world


def main() -> None:
    common.need("data,serve", "av", "cv2", "PIL")
    run(common.read_fields(GenerateConfig))


def run(config: GenerateConfig) -> None:
    began, console = time.monotonic(), Console()
    with whole_folder(config.out) as folder:
        plan = generate.plan(config, find(config.run).config)
        world = open_world(config.run, dtype=config.dtype)
        generate.check_prompts(plan, world.text)
        frames, (height, width) = len(plan.path), plan.first.shape[:2]
        if frames != plan.given:
            console.print(
                f"{frames} frames instead of the path's {plan.given}: whole chunks of latent frames"
            )
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(f"{frames} frames of {width}x{height}", total=plan.work)
            video = generate.frames(plan, world, lambda done: progress.advance(task, done))
        about = {
            "command": common.command("experiments.generate", config),
            "image_sha256": hashlib.sha256(pathlib.Path(config.image).read_bytes()).hexdigest(),
            **generate.about(plan),
            "seconds": round(time.monotonic() - began, 2),
        }
        generate.write(folder, plan, video, about)
    console.print(f"{config.out}/video.mp4  {frames} frames of {width}x{height}, {about['seconds']} s")


if __name__ == "__main__":
    common.define_fields(GenerateConfig)
    common.run(main)
