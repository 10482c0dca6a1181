"""The model card of what `experiments.convert` writes: what the world is, of what it was made, how it is opened."""

import os
from collections.abc import Iterator

from etils import epath

from lingbot_jax import cards
from lingbot_jax.config import ConfigError
from lingbot_jax.convert import report
from lingbot_jax.convert.contents import Contents
from lingbot_jax.convert.write import StoredDtype, cast
from lingbot_jax.files import is_remote
from lingbot_jax.training.config import POST_TRAINING, TrainConfig
from lingbot_jax.training.run_dir import load_config
from lingbot_jax.worlds.checkpoints import Checkpoints
from lingbot_jax.worlds.open import RUN

TRAINING = "Training"
OPEN = """```python
import lingbot_jax

world = lingbot_jax.open_world("{out}")
```"""
PUBLISHED = """Safetensors with the published names, for the published code. Here it is a source like any other:

```
python -m experiments.convert --source={out} --out=bundles/mine
```"""


def model_card(
    contents: Contents, out: str, dtype: StoredDtype, licence: str | None = None, published: bool = False
) -> str:
    """The card of a bundle, or of a published folder.

    Args:
      out: where it is written. dtype: of the stored networks. licence: its name on the Hub, as `apache-2.0`; None: that
        of the source's own card, else unknown.
    """
    own = [_card_of(path) for path in _sources(contents)]
    stated = {front["license"] for text in own if (front := cards.front_matter(text)).get("license")}
    licence = licence or (stated.pop() if len(stated) == 1 else cards.UNKNOWN)
    world, name = contents.config, os.path.basename(out.rstrip("/"))
    front = {
        "license": licence,
        "library_name": "lingbot_jax",
        "pipeline_tag": "image-to-video",
        "tags": ["world-model", "video-generation", "jax"],
    }
    if world.causal is not None:
        kind = "chunk after chunk from an image, a prompt and keys or a camera path: it can be played"
    else:
        kind = "a whole clip at once from an image, a prompt and a camera path"
    about = f"A world model: it makes {kind}. Written by `experiments.convert` of lingbot_jax."
    if licence == cards.UNKNOWN:
        about += " Its licence is not stated: that of the weights and the data it was made of holds."
    count = lambda part: report.amount(report.parameters(cast(part, dtype)))
    rows = [(part.name, report.sizes(part.config), count(part)) for part in contents.parts]
    stored = f"\n\nStored as {dtype}, the codec as it was." if dtype != "keep" else ""
    inside = cards.table(("part", "sizes", "parameters"), rows) + stored
    sources = _sources(contents)
    origin = [f"Source: {contents.kind} {' and '.join(f'`{_short(path)}`' for path in sources)}."]
    origin += [_training(p) or cards.section(text, TRAINING) for p, text in zip(sources, own, strict=True)]
    use = (PUBLISHED if published else OPEN).format(out=name)
    if world.causal is not None and not published:
        use += f"\n\nOr in a page: `python -m experiments.serve --run={name}`."
    sections = {
        "What it is": about,
        "What is inside": inside,
        "Sampling": "\n".join(f"- {line}" for line in report.sampling(world)),
        TRAINING: "\n\n".join(filter(None, origin)),
        "How to use it": use,
    }
    return cards.card(front, name, sections)


def _sources(contents: Contents) -> list[str]:
    """The folders that the contents are from."""
    path = contents.path
    if is_remote(path) and "," not in path or os.path.isdir(path):
        return [path]
    return [entry.strip().removeprefix("high=").removeprefix("low=") for entry in path.split(",")]


def _short(path: str) -> str:
    """A path without the folders of somebody's disk that it lies in."""
    return path if is_remote(path) else "/".join(path.rstrip("/").split("/")[-2:])


def _card_of(path: str) -> str:
    file = epath.Path(path) / cards.README
    return file.read_text() if file.exists() else ""


def _training(path: str) -> str:
    """Of a run: stage, steps, data and where it began. Empty for anything else."""
    if not (epath.Path(path) / RUN).exists():
        return ""
    try:
        config = load_config(path)
    except ConfigError:  # of another version: its world was read all the same
        return ""
    with Checkpoints(path, read_only=True) as checkpoints:
        done = max(checkpoints.steps(), default=0)
    return "\n".join(f"- {line}" for line in _lines(config, done))


def _lines(config: TrainConfig, done: int) -> Iterator[str]:
    yield f"stage `{config.stage}`, {done} of {config.steps} steps, seed {config.seed}"
    if config.init is not None:
        yield f"began as `{_short(config.init)}`"
    if config.stage in POST_TRAINING and config.teacher is not None:
        yield f"learnt from `{_short(config.teacher)}`"
    optimizer = config.optimizer
    yield f"{optimizer.algorithm}, learning rate {optimizer.learning_rate:g}, averaged with {optimizer.ema:g}"
    for phase in config.phases():
        data = phase.data
        sets = ", ".join(f"`{_short(part.path)}` (weight {part.weight:g})" for part in data.parts())
        size = "" if phase.size == (0, 0) else f" of {phase.size[0]} x {phase.size[1]}"
        yield f"{data.batch} clips per step, {data.frames} frames{size}, from {sets}"
