"""Compiles the programs of a run for a TPU topology, without a TPU, and says what they cost.

    python -m experiments.plan --config=experiments/configs/w14b.py:world --topology=v5p:4x4x4
    python -m experiments.plan --config=... --topology=v5p:8x8x8 --phase=all
    python -m experiments.plan --config=... --topology=v6e:8x8 --search
    python -m experiments.plan --config=... --topology=v6e:8x8 --program=encode --json
    python -m experiments.plan --config=experiments/configs/w14b.py:fast --topology=tpu7x:2x2x1 --program=chunk

It plans the step of the first phase of the config's curriculum, or of another with --phase; --search tries other
meshes. A program of serving is planned for one session or clip on all devices. docs/parallelism.md explains every
figure, docs/serving.md those of serving. Needs the `tpu` extra (libtpu compiles on any Linux machine).
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator

from absl import flags
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from experiments import common
from experiments.common import UserError
from lingbot_jax.planning.estimate import Plan, plan_encode, plan_train
from lingbot_jax.planning.latency import COMPUTES, plan_serving
from lingbot_jax.planning.programs import Where, case
from lingbot_jax.planning.report import describe, describe_serving, line
from lingbot_jax.planning.search import search
from lingbot_jax.planning.serving import serving
from lingbot_jax.training.config import TrainConfig

SERVED = ("chunk", "decode", "sample")
CONFIG = common.define_config(TrainConfig)
TOPOLOGY = flags.DEFINE_string("topology", None, "TPU generation and shape, e.g. v5p:8x8x4 or v6e:8x8")
SLICES = flags.DEFINE_integer("slices", 1, "slices of that shape, joined along the data axis", lower_bound=1)
PROGRAM = flags.DEFINE_enum(
    "program",
    "train",
    ["train", "encode", *SERVED],
    "the training step, the encoders' program, or of serving: a chunk of play, its decoding, a whole clip",
)
WEIGHTS = flags.DEFINE_enum(
    "weights", "split", ["split", "whole"], "of serving: parameters split over the devices, or whole on each"
)
QUANTIZE = flags.DEFINE_enum("quantize", "none", list(COMPUTES), "of serving: how parameters are stored")
PHASE = flags.DEFINE_string("phase", "0", "index of a phase of the curriculum, or all: one line per phase")
HEIGHT = flags.DEFINE_integer("height", None, "pixels; of the config's size by default")
WIDTH = flags.DEFINE_integer("width", None, "pixels; of the config's size by default")
TOKENS = flags.DEFINE_float("tokens", 1e11, "training tokens that chip_hours are for", lower_bound=0.0)
SEARCH = flags.DEFINE_bool(
    "search", False, "try meshes, rematerialisation and microbatches; print the best first"
)
CANDIDATES = flags.DEFINE_integer(
    "max_candidates", 6, "candidates that --search compiles, most promising first", lower_bound=1
)
JSON = flags.DEFINE_bool("json", False, "print one JSON object, the last line of stdout")


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Says on stderr what takes a while; on a terminal with a clock."""
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    if not console.is_terminal:
        print(what, file=sys.stderr, flush=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(what, total=None)
        yield


def plan(config: TrainConfig, where: Where, phase: int) -> Plan:
    """The plan of one phase, with a note of the wait."""
    made = case(config, where, phase)
    with working(
        f"compiling {PROGRAM.value} of phase {phase} for {where.topology}: a minute, of large worlds several"
    ):
        return plan_train(made, TOKENS.value) if PROGRAM.value == "train" else plan_encode(made)


def print_phases(config: TrainConfig, where: Where) -> None:
    plans = [plan(config, where, phase) for phase in range(len(config.phases()))]
    if JSON.value:
        values = {"fits": all(p.fits for p in plans), "phases": [dataclasses.asdict(p) for p in plans]}
        print(json.dumps(values))
    else:
        print("\n".join(line(p) for p in plans))


def print_search(config: TrainConfig, where: Where, phase: int) -> None:
    if PROGRAM.value != "train":
        raise UserError(f"--search with --program={PROGRAM.value}: plans the training step only")
    note = lambda text: print(text, file=sys.stderr, flush=True)
    limits = {"max_candidates": CANDIDATES.value, "tokens": TOKENS.value}
    found = search(config, where, phase, **limits, note=note)
    if JSON.value:
        tried = [dataclasses.asdict(f.plan) | {"flags": f.flags} for f in found]
        print(json.dumps(tried[0] | {"tried": tried}))
        return
    for f in found:
        print(line(f.plan) + "\n  " + (" ".join(f.flags) or "the config as it is"))
    print(describe(found[0].plan))
    print("flags: " + (" ".join(found[0].flags) or "none, the config as it is"))


def print_serving(config: TrainConfig, where: Where) -> None:
    made = serving(config, where, WEIGHTS.value)
    with working(f"compiling {PROGRAM.value} for {where.topology}: a minute or two per program"):
        plan = plan_serving(made, PROGRAM.value, QUANTIZE.value)
    print(json.dumps(dataclasses.asdict(plan)) if JSON.value else describe_serving(plan))


def main() -> None:
    config = common.load(CONFIG, TrainConfig)
    if TOPOLOGY.value is None:
        raise UserError("--topology is missing: give e.g. --topology=v5p:4x4x4")
    where = Where(TOPOLOGY.value, SLICES.value, HEIGHT.value, WIDTH.value)
    if PROGRAM.value in SERVED:
        if PHASE.value != "0" or SEARCH.value:
            raise UserError(f"--program={PROGRAM.value}: has no phases, and nothing to search")
        print_serving(config, where)
        return
    for flag in (WEIGHTS, QUANTIZE):
        if flag.value != flag.default:
            raise UserError(
                f"--{flag.name}={flag.value}: only of {', '.join(SERVED)}, not of --program={PROGRAM.value}"
            )
    if PHASE.value == "all" and SEARCH.value:
        raise UserError("--search with --phase=all: give one phase")
    if PHASE.value == "all":
        print_phases(config, where)
    elif not PHASE.value.isdecimal():
        raise UserError(f"--phase={PHASE.value}: give the index of a phase, or all")
    elif SEARCH.value:
        print_search(config, where, int(PHASE.value))
    else:
        made = plan(config, where, int(PHASE.value))
        print(json.dumps(dataclasses.asdict(made)) if JSON.value else describe(made))


if __name__ == "__main__":
    common.run(main)
