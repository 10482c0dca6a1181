"""Published weights to a bundle, and back.

    python -m experiments.convert --source=lingbot-world-base-cam --out=bundles/base-cam --control=cam
    python -m experiments.convert --source=bundles/base-cam --out=exported --to=published

--dry_run checks every tensor and prints the plan. Formats and memory: docs/convert.md.
"""

from absl import flags, logging
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from experiments import common
from lingbot_jax.control.plucker import CONTROL_CHANNELS
from lingbot_jax.convert import folders, write

_SOURCE = flags.DEFINE_string(
    "source", None, "checkpoint folder (published or diffusers layout), or a bundle"
)
_OUT = flags.DEFINE_string("out", None, "folder to make", allow_override=True)  # generate has one too
_TO = flags.DEFINE_enum("to", "bundle", ["bundle", "published"], "what to write")
_DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float32", "keep"], "of stored transformers and text encoder"
)
_CONTROL = flags.DEFINE_enum(
    "control", None, list(CONTROL_CHANNELS), "control channels, where config.json does not say them"
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "check everything, print the plan, write nothing")


def main() -> None:
    logging.set_verbosity(
        logging.ERROR
    )  # Orbax warns that there is nothing to merge, which is as it should be
    for flag in (_SOURCE, _OUT):
        if flag.value is None and not (flag is _OUT and _DRY_RUN.value):
            raise common.UserError(f"--{flag.name} is missing")
    if _TO.value == "published":
        if _DRY_RUN.value:
            raise common.UserError("--dry_run: only with --to=bundle")
        with _progress() as progress:
            write.to_published(_SOURCE.value, _OUT.value, _ticker(progress))
        print(f"wrote {_OUT.value}")
        return
    checkpoint = folders.find(_SOURCE.value, control=_CONTROL.value)
    plans = write.plan(checkpoint, _DTYPE.value)
    for plan in plans:
        print(plan)
    if checkpoint.others:
        print(f"left out: {', '.join(checkpoint.others)}")
    total, stored = sum(p.parameters for p in plans), sum(p.nbytes for p in plans)
    print(f"total: {total / 1e9:.2f}B parameters, {stored / 1e9:.2f} GB to write")
    if _DRY_RUN.value:
        return
    with _progress() as progress:
        sizes = {plan.network.name: plan.nbytes for plan in plans}
        write.to_bundle(checkpoint, _OUT.value, _DTYPE.value, _ticker(progress, sizes))
    print(f"wrote {_OUT.value}")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        transient=True,
    )


def _ticker(progress: Progress, sizes: dict[str, int] | None = None) -> write.Progress:
    """One bar a network, made when its first bytes are written."""
    tasks = {}

    def tick(network: str, done: int) -> None:
        if network not in tasks:
            tasks[network] = progress.add_task(network, total=(sizes or {}).get(network))
        progress.advance(tasks[network], done)

    return tick


if __name__ == "__main__":
    common.run(main)
