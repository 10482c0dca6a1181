"""The card of a bundle: what the Hub reads of it, and what a reader can do with it."""

import dataclasses
import json
import re

import jax.numpy as jnp
import pytest
from huggingface_hub import ModelCard

from experiments.configs import tiny
from lingbot_jax import cards
from lingbot_jax.config import build
from lingbot_jax.convert import contents, report
from lingbot_jax.convert.card import model_card
from lingbot_jax.models.codec import LinearCodec
from lingbot_jax.models.config import LinearCodecConfig, NgramConfig
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.worlds.config import CausalConfig, WorldConfig
from lingbot_jax.worlds.open import write_codec
from tests.convert.published import Sizes


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """A run that was stopped after 5 of 40 steps."""
    place = tmp_path_factory.mktemp("card")
    codec = LinearCodec(LinearCodecConfig(channels=4), jnp.zeros((2,), jnp.uint32))
    write_codec(place / "codec", codec)
    dit = dataclasses.replace(Sizes().dit, text_dim=16, text_len=8)
    text, causal = NgramConfig(dim=16, length=8), CausalConfig(chunk=1, window=3, sink=1)
    world = WorldConfig(networks={"world": dit}, codec=codec.config, text=text, causal=causal)
    (place / "run" / "checkpoints" / "5").mkdir(parents=True)
    values = tiny.get_config("world").to_dict() | {"world": dataclasses.asdict(world), "steps": 40, "seed": 3}
    values |= {"codec": str(place / "codec"), "run": str(place / "run")}
    values["data"] |= {"path": "/home/me/data/rooms", "mixture": [{"path": "gs://b/streets", "weight": 2.0}]}
    (place / "run" / "config.json").write_text(json.dumps(dataclasses.asdict(build(TrainConfig, values))))
    return str(place / "run")


def test_a_card_says_what_and_of_what(run, tmp_path):
    found = contents.look(run)
    text = model_card(found, str(tmp_path / "walk"), "bfloat16")
    data = ModelCard(text).data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "unknown",
        "lingbot_jax",
        "image-to-video",
    )
    for part in found.parts:
        count = report.amount(report.parameters(part))
        assert f"| {part.name} | {report.sizes(part.config)} | {count} |" in text
    assert "stage `world`, 5 of 40 steps, seed 3" in text and "Its licence is not stated" in text
    assert "`data/rooms` (weight 1), `gs://b/streets` (weight 2)" in text and "/home/me" not in text
    assert "chunk after chunk" in text and "experiments.serve --run=walk" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert 'lingbot_jax.open_world("walk")' in code


def test_a_card_goes_on_from_that_of_its_source(run, tmp_path):
    """Of a bundle, as far as a card looks at it: a folder with a card."""
    (tmp_path / "README.md").write_text(model_card(contents.look(run), "walk", "bfloat16", "cc-by-4.0"))
    source = dataclasses.replace(contents.look(run), kind="bundle", path=str(tmp_path))
    text = model_card(source, "walk8", "int8")
    assert ModelCard(text).data.license == "cc-by-4.0" and "not stated" not in text
    assert "stage `world`, 5 of 40 steps, seed 3" in cards.section(text, "Training")
    assert ModelCard(model_card(source, "walk8", "int8", "apache-2.0")).data.license == "apache-2.0"


@pytest.mark.parametrize(
    "text", ["", "no card", "---\n: {\n---\n", "---\n- a\n---\n", "---\nlicense:\n---\n"]
)
def test_a_source_with_another_readme(run, tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    source = dataclasses.replace(contents.look(run), kind="bundle", path=str(tmp_path))
    made = model_card(source, "b", "keep")
    assert ModelCard(made).data.license == "unknown" and "Source: bundle" in made
