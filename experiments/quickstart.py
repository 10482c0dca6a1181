"""The whole path in minutes on a CPU: collect, fit the codec, train, generate, evaluate, report (`make demo`).

python -m experiments.quickstart [--long] [--source=vizdoom] [--fresh] [--root=runs/demo] [--set=STAGE.FIELD=VALUE ...]

The world is one of generated places; --source=vizdoom takes a game instead (its engine's licence is non-commercial).
--long trains the shipped world for hours (experiments/configs/shipped.py), under runs/shipped.

Every stage is an experiment of its own, run with the command that is shown. Running it twice reuses what is
there and goes on where it stopped; --fresh starts over. Ends with ROOT/report.html and ROOT/metrics.json.
"""

import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable

import numpy as np
import psutil
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import common
from experiments.common import UserError
from experiments.configs import shipped, tiny
from lingbot_jax.data.crops import crops
from lingbot_jax.data.video import write_image
from lingbot_jax.evaluation.demo import write_report
from lingbot_jax.models.text import HashedNgramEncoder, is_truncated
from lingbot_jax.training.run_dir import load_config

SOURCES = ("rendered", "vizdoom")

ROOT = flags.DEFINE_string(
    "root", None, "folder of everything that is made; default: runs/demo, with --long runs/shipped"
)
LONG = flags.DEFINE_bool("long", False, "train the shipped world, for hours, in place of the tiny one")
SOURCE = flags.DEFINE_string(
    "source",
    None,
    f"where clips come from: {' or '.join(SOURCES)}; default: as the config says",
    allow_override=True,  # convert has one too
)
FRESH = flags.DEFINE_bool("fresh", False, "remove what an earlier run made, and start over")
SET = flags.DEFINE_multi_string(
    "set", [], "STAGE.FIELD=VALUE: a config override of one stage, e.g. world.steps=100"
)

KEYS = "w-8,j-8,w-8,l-8"  # of the walk: 33 frames


@dataclasses.dataclass(frozen=True)
class Stage:
    """One experiment.

    Attributes:
      out: what it makes, a file or a folder. arguments: known once it is its turn.
      settings: the config file's module. flag: prefix of its fields on the command line.
      resumes: goes on with a half-made `out` by itself.
    """

    name: str
    title: str
    experiment: str
    out: pathlib.Path
    arguments: Callable[[], list[str]]
    settings: types.ModuleType
    flag: str = "--config."
    resumes: bool = True

    def config(self) -> str | None:
        """What the config file says of this stage, so that an edited file is noticed."""
        return repr(self.settings.get_config(self.name).to_dict()) if self.flag == "--config." else None

    def command(self, overrides: list[str]) -> list[str]:
        return [sys.executable, "-m", f"experiments.{self.experiment}", *self.arguments(), *overrides]

    def ended(self, entry: dict | None, overrides: list[str]) -> bool:
        """Whether the log says that this very stage, same command and same config, has ended."""
        same = lambda: (entry["command"], entry["config"]) == (_shown(self.command(overrides)), self.config())
        return bool(entry) and entry["done"] and same()


def stages(root: pathlib.Path, settings: types.ModuleType = tiny, source: str | None = None) -> list[Stage]:
    """Every stage of a world.

    Args:
      settings: module of the config file, tiny or shipped. source: of the clips; None: the config's.
    """
    data, codec, world, action = root / "data", root / "codec", root / "world", root / "action"
    walk, out, causal, distill = (root / name for name in ("walk", "evaluation", "causal", "distill"))
    long, compared = root / "long", root / "compare"
    file = f"experiments/configs/{settings.__name__.rpartition('.')[2]}.py"

    def config(name: str, **fields: pathlib.Path) -> Callable[[], list[str]]:
        paths = [f"--config.{field.replace('__', '.')}={path}" for field, path in fields.items()]
        return lambda: [f"--config={file}:{name}", *paths]

    trained = {"codec": codec, "data__path": data}
    chosen = {"source": source} if source else {}
    collected, far = {"out": data} | chosen, {"out": long} | chosen
    plan = [
        ("collect", "Collect clips", "collect", data, config("collect", **collected)),
        ("codec", "Fit the latent codec", "fit_codec", codec, config("codec", out=codec, data__path=data)),
        ("world", "Train the world model", "train", world, config("world", run=world, **trained)),
        (
            "action",
            "Train the action adapters",
            "train",
            action,
            config("action", run=action, init=world, **trained),
        ),
        ("walk", "Walk through an unseen place", "generate", walk, lambda: walk_arguments(root)),
        ("evaluate", "Measure held-out clips", "evaluate", out, config("evaluate", run=action, out=out)),
        (
            "causal",
            "Make it causal: chunk after chunk",
            "train",
            causal,
            config("causal", run=causal, init=action, **trained),
        ),
        (
            "distill",
            "Distil it to four steps on its own rollouts",
            "train",
            distill,
            config("distill", run=distill, init=causal, teacher=action, **trained),
        ),
        ("collect_long", "Collect long held-out clips", "collect", long, config("collect_long", **far)),
        (
            "compare",
            "Compare before and after on long clips",
            "compare",
            compared,
            config("compare", teacher=action, causal=causal, distilled=distill, path=long, out=compared),
        ),
    ]
    own = {"walk": {"flag": "--", "resumes": False}}  # flags in place of a config, and made at one go
    return [Stage(*entry, settings, **own.get(entry[0], {})) for entry in plan]


def walk_arguments(root: pathlib.Path) -> list[str]:
    """A walk from a held-out first frame, in windows of the length that was trained.

    The frame is the most colourful of those whose caption the model can read to its end.
    """
    run = load_config(root / "action")
    clips = next(iter(crops(dataclasses.replace(run.data, frames=1, batch=64), "held_out")))
    captions = clips[run.world.caption]
    colour = clips["frames"].std(axis=(1, 2, 3)).sum(-1)
    cut = is_truncated(HashedNgramEncoder(run.world.text), [str(caption) for caption in captions])
    best = int(np.argmax(np.where(cut, -1, colour)))
    image = root / "first_frame.png"
    write_image(image, clips["frames"][best, 0])
    return [
        f"--run={root / 'action'}",
        f"--image={image}",
        f"--prompt={captions[best]}",
        f"--keys={KEYS}",
        "--intrinsics=" + ",".join(f"{v:g}" for v in clips["intrinsics"][best, 0]),
        f"--clip_frames={run.data.frames}",
        "--fps=8",
        "--zoom=6",
        f"--out={root / 'walk'}",
    ]


class PeakMemory(threading.Thread):
    """Samples the resident memory of a process and its children, twice a second."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self._root, self._stop_event, self.gib = psutil.Process(pid), threading.Event(), 0.0

    def run(self) -> None:
        while not self._stop_event.wait(0.5):
            total = 0
            try:
                for process in [self._root, *self._root.children(recursive=True)]:
                    total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue  # it ended between the listing and the reading
            self.gib = max(self.gib, total / 2**30)

    def stop(self) -> float:
        self._stop_event.set()
        self.join()
        return self.gib


def run_stage(stage: Stage, command: list[str], log: dict, path: pathlib.Path) -> None:
    """Runs one stage and records its seconds and memory; an interrupted stage adds up over its attempts."""
    shown = _shown(command)
    print(f"\n$ {shown}", flush=True)
    began = time.monotonic()
    environment = {"JAX_PLATFORMS": "cpu", **os.environ}
    process = subprocess.Popen(command, env=environment)
    memory = PeakMemory(process.pid)
    memory.start()
    code = None
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise UserError("interrupted; the same command goes on from here") from None
    finally:
        before = log.get(stage.name, {"seconds": 0.0, "peak_rss_gib": 0.0})
        log[stage.name] = {
            "command": shown,
            "config": stage.config(),
            "done": code == 0,
            "seconds": before["seconds"] + time.monotonic() - began,
            "peak_rss_gib": max(before["peak_rss_gib"], memory.stop()),
        }
        path.write_text(json.dumps(log, indent=2) + "\n")
    if code:
        raise UserError(f"stage {stage.name} ended with code {code}; its message is above")


def main() -> None:
    settings = shipped if LONG.value else tiny
    if SOURCE.value not in (None, *SOURCES):
        raise UserError(f"--source={SOURCE.value}: must be {' or '.join(SOURCES)}")
    root, console = pathlib.Path(ROOT.value or settings.ROOT), Console()
    if FRESH.value and root.exists():
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    plan, log_path = stages(root, settings, SOURCE.value), root / "stages.json"
    prefixes = {stage.name: stage.flag for stage in plan}
    overrides: dict[str, list[str]] = {name: [] for name in prefixes}
    for item in SET.value:
        name, _, field = item.partition(".")
        if name not in prefixes or "=" not in field:
            raise UserError(f"--set={item}: must be STAGE.FIELD=VALUE with a stage of {', '.join(prefixes)}")
        overrides[name].append(prefixes[name] + field)

    log = json.loads(log_path.read_text()) if log_path.exists() else {}
    done = lambda stage: stage.out.exists() and stage.ended(log.get(stage.name), overrides[stage.name])
    first = next((i for i, stage in enumerate(plan) if not done(stage)), len(plan))
    table = Table("stage", "what", "state", title=f"lingbot_jax world in {root}")
    for number, stage in enumerate(plan):
        table.add_row(stage.name, stage.title, "there" if number < first else "to do")
    console.print(table)
    for number, stage in enumerate(plan[first:], first):
        # Made from what an earlier stage has just replaced, or of no use half-made.
        if stage.out.exists() and (number > first or not stage.resumes):
            shutil.rmtree(stage.out) if stage.out.is_dir() else stage.out.unlink()
            log.pop(stage.name, None)
        console.rule(f"{number + 1}/{len(plan)} {stage.title}")
        run_stage(stage, stage.command(overrides[stage.name]), log, log_path)
    metrics = write_report(root, {s.name: log[s.name] for s in plan if s.name in log}, KEYS)
    summary = Table("measure", "value", title=str(root / "report.html"))
    for name, value in metrics.items():
        summary.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    console.print(summary)


def _shown(command: list[str]) -> str:
    return shlex.join(["python", *command[1:]])


if __name__ == "__main__":
    common.run(main)
