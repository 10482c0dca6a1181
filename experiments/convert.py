"""Published weights, runs and bundles into one another.

    python -m experiments.convert --source=lingbot-world-base-cam --out=bundles/base-cam
    python -m experiments.convert --source=high=runs/high,low=runs/low --out=bundles/mine
    python -m experiments.convert --source=runs/demo/distill --out=bundles/play --pictures=12
    python -m experiments.convert --source=bundles/mine --out=exported --to=published
    python -m experiments.convert --source=runs/lora --out=adapters --to=lora
    python -m experiments.convert --source=ANYTHING --inspect

What is written has a card (README.md), for the Hugging Face Hub too. Formats, downloads and memory: docs/convert.md.
"""

from absl import flags, logging
from rich.console import Console
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
from lingbot_jax.convert import contents, lora, pictures, presets, report, write
from lingbot_jax.convert.card import model_card
from lingbot_jax.worlds.manifest import Starts

_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "checkpoint folder (published or diffusers layout), run or bundle; or high=FOLDER,low=FOLDER",
)
_OUT = flags.DEFINE_string("out", None, "folder to make", allow_override=True)  # generate has one too
_TO = flags.DEFINE_enum(
    "to",
    "bundle",
    ["bundle", "published", "lora"],
    "what to write; lora: the low-rank adapters of a run alone, for diffusers",
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["bfloat16", "float32", "int8", "keep"],
    "of stored transformers and text encoder (int8: bundles only, a scale per output); default: keep from a bundle or "
    "folder to published, else bfloat16",
)
_CONTROL = flags.DEFINE_enum(
    "control", None, list(CONTROL_CHANNELS), "control channels, where a checkpoint folder does not say them"
)
_PICTURES = flags.DEFINE_string(
    "pictures",
    None,
    "pictures to start from: how many first frames of held-out clips of the run's data, or a folder of images "
    "(NAME.txt beside each: its prompt); default: those of the source",
)
_ASSETS = flags.DEFINE_string(
    "assets", None, "folder with the codec, text encoder and tokenizer that a checkpoint folder lacks"
)
_HEADS = flags.DEFINE_integer(
    "heads", None, "attention heads of a transformer without config.json; default: heads of 128", 1, 65536
)
_PRESET = flags.DEFINE_enum(
    "preset",
    None,
    list(presets.PRESETS),
    "how a checkpoint folder's world is sampled; default: by its layout",
)
_LICENSE = flags.DEFINE_string(
    "license",
    None,
    "for the card, as the Hub names it: apache-2.0, cc-by-nc-4.0; default: that of the source's card",
)
_INSPECT = flags.DEFINE_bool("inspect", False, "check everything, say what there is, write nothing")
flags.DEFINE_alias("dry_run", "inspect")


def main() -> None:
    logging.set_verbosity(
        logging.ERROR
    )  # Orbax warns that there is nothing to merge, which is as it should be
    for flag in (_SOURCE, _OUT):
        if flag.value is None and not (flag is _OUT and _INSPECT.value):
            raise common.UserError(f"--{flag.name} is missing")
    hints = {"control": _CONTROL, "assets": _ASSETS, "heads": _HEADS, "preset": _PRESET}
    found = contents.look(_SOURCE.value, **{name: flag.value for name, flag in hints.items()})
    to_bundle = _TO.value == "bundle"
    rounds = to_bundle or ("run" in found.kind and _TO.value == "published")
    dtype = _DTYPE.value or ("bfloat16" if rounds else "keep")
    for line in report.describe(found, dtype):
        print(line)
    found.check()
    if _PICTURES.value is not None and not to_bundle:
        raise common.UserError(f"--pictures={_PICTURES.value}: only bundles have a place for them")
    starts = pictures.choose(_PICTURES.value, found) if to_bundle else Starts()
    if starts.pictures:
        print(f"pictures: {len(starts.pictures)} to start from")
    if _INSPECT.value:
        return
    if _TO.value == "lora":
        lora.to_lora(_SOURCE.value, _OUT.value, dtype)
        print(f"wrote {_OUT.value}")
        return
    written = model_card(found, _OUT.value, dtype, _LICENSE.value, published=not to_bundle)
    with _progress() as progress:
        sizes = {part.name: write.nbytes(write.cast(part, dtype).specs) for part in found.parts}
        if to_bundle:
            write.to_bundle(found, _OUT.value, dtype, _ticker(progress, sizes), starts, written)
        else:
            write.to_published(found, _OUT.value, dtype, _ticker(progress, sizes), written)
    print(f"wrote {_OUT.value}")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        transient=True,
        console=Console(stderr=True),
    )


def _ticker(progress: Progress, sizes: dict[str, int]) -> write.Progress:
    """One bar per network, made when its first bytes are written."""
    tasks = {}

    def tick(network: str, done: int) -> None:
        if network not in tasks:
            tasks[network] = progress.add_task(network, total=sizes[network])
        progress.advance(tasks[network], done)

    return tick


if __name__ == "__main__":
    common.run(main)
