"""Checkpoint folders of LingBot-World 2.0, a miniature of each layout: found, described, converted both ways."""

import dataclasses
import itertools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.configs import lingbot2
from lingbot_jax.config import ConfigError, build
from lingbot_jax.convert import contents, folders, names_dit, write
from lingbot_jax.convert.names import layers_of, part_names
from lingbot_jax.convert.presets import PRESETS
from lingbot_jax.parallel.mesh import MeshConfig, make_mesh
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.training.start import objective_of, read_init, resolve
from lingbot_jax.training.step import encode_program, make_step
from lingbot_jax.worlds.open import find
from tests.convert.published import (
    Sizes,
    dit_json,
    random_tensors,
    write_json,
    write_published,
    write_sharded,
)

DIT = Sizes().dit
TENSORS = random_tensors(DIT, names_dit.dit_table(DIT), 3, np.float32)
FAST = PRESETS["lingbot2-14b"]["causal"]


@pytest.fixture
def assets(tmp_path) -> pathlib.Path:
    """A folder of codec, text encoder and tokenizer."""
    write_published(tmp_path / "assets", experts=())
    return tmp_path / "assets"


def fast_14b(assets: pathlib.Path, name: str = "transformers", kind: str = "WanXModel") -> pathlib.Path:
    """Weights in a folder of their own, config.json beside it."""
    place = assets.parent / f"world-{name}"
    shutil.copytree(assets, place)
    (place / name).mkdir()
    write_json(place / "config.json", dit_json(DIT, _class_name=kind, control_type=None))
    write_sharded(place / name, TENSORS, 3)
    return place


def small(folder: pathlib.Path) -> pathlib.Path:
    """Shards alone, as the 1.3B comes."""
    folder.mkdir()
    write_sharded(folder, TENSORS, 2)
    (folder / "diffusion_pytorch_model.safetensors.index.json").rename(
        folder / "model.safetensors.index.json"
    )
    return folder


def diffusers_copy(assets: pathlib.Path) -> pathlib.Path:
    place = assets.parent / "copy"
    shutil.copytree(assets, place)
    (place / "transformer").mkdir()
    values = {
        "_class_name": folders.DIFFUSERS_SECOND,
        "num_attention_heads": DIT.heads,
        "attention_head_dim": DIT.head_dim,
        "num_layers": DIT.layers,
        "ffn_dim": DIT.ffn,
        "sink_size": 9,
        "num_frames_per_block": 3,
        "sliding_window_num_frames": 18,
        "flow_shift": 5,
    }
    write_json(place / "transformer" / "config.json", values)
    write_sharded(place / "transformer", TENSORS, 2)
    return place


def described(found: contents.Contents):
    """The one transformer of a source, without what its config.json does not say."""
    assert list(found.config.networks) == ["world"]
    return dataclasses.replace(found.config.network, text_len=DIT.text_len)


def test_the_fast_14b_has_its_config_beside_its_weights(assets):
    found = contents.look(str(fast_14b(assets)))
    assert described(found) == DIT and found.config.causal == FAST and found.config.sample is None
    assert found.config.causal.shift == 10 and found.config.causal.levels == (0, 250, 500, 750)


def test_the_causal_pretrain_is_guided_in_chunks(assets):
    found = contents.look(str(fast_14b(assets, "transformer_causal", "WanModelCausal")))
    assert described(found) == DIT and found.config.causal.guided
    assert (found.config.causal.sample.steps, found.config.causal.sample.shift) == (40, 10)


def test_the_1_3b_is_read_off_its_shapes(assets, tmp_path):
    place = small(tmp_path / "small")
    with pytest.raises(ConfigError, match="width 64 is not made of heads of 128; give --heads"):
        contents.look(str(place))
    found = contents.look(str(place), heads=DIT.heads, assets=str(assets))
    found.check()
    assert described(found) == DIT and found.config.causal == PRESETS["lingbot2-1.3b"]["causal"]
    assert found.config.codec and found.config.text and found.tokenizer
    with pytest.raises(ConfigError, match="assets = .*has no codec and no text encoder"):
        contents.look(str(place), heads=DIT.heads, assets=str(place))


def test_the_diffusers_copy_says_how_it_is_sampled(assets):
    found = contents.look(str(diffusers_copy(assets)))
    causal = found.config.causal
    assert described(found) == DIT
    assert (causal.chunk, causal.window, causal.sink, causal.shift) == (3, 18, 9, 5.0)
    assert (causal.schedule, causal.levels) == ("warped", (1000, 750, 500, 250))


def test_a_preset_goes_before_the_layout(assets):
    found = contents.look(str(fast_14b(assets)), preset="lingbot2-14b-warped")
    assert found.config.causal == PRESETS["lingbot2-14b-warped"]["causal"] != FAST


def test_two_worlds_in_a_folder_are_refused(assets):
    place = fast_14b(assets)
    shutil.copytree(place / "transformers", place / "transformer_causal")
    with pytest.raises(ConfigError, match="has transformers/ and transformer_causal/: two worlds"):
        contents.look(str(place))
    (place / "transformer_causal").rename(place / "high_noise_model")
    write_json(place / "high_noise_model" / "config.json", dit_json(DIT))
    with pytest.raises(ConfigError, match="2 transformer folders"):
        contents.look(str(place))


@pytest.mark.parametrize("argument", ["action", "causal", "distill", "distill,1.3b"])
def test_the_shipped_configs_fit_their_crops(argument):
    build(TrainConfig, json.loads(json.dumps(lingbot2.get_config(argument).to_dict()))).check_crops()


def test_a_student_is_not_trained_for_the_many_steps_of_the_pretrain():
    values = lingbot2.get_config("causal").to_dict()
    values["world"]["causal"] = dataclasses.asdict(PRESETS["lingbot2-14b-causal-pretrain"]["causal"])
    with pytest.raises(ConfigError, match=r"world.causal.sample = .*: must be None: a student has few steps"):
        build(TrainConfig, json.loads(json.dumps(values)))


def test_training_goes_on_from_its_checkpoints(assets, tmp_path):
    """The shipped config in miniature: every network of a run starts with the published bits, and a step traces."""
    sources = {
        "causal": contents.look(str(fast_14b(assets, "transformer_causal", "WanModelCausal"))),
        "teacher": contents.look(
            str(small(tmp_path / "small")),
            preset="lingbot2-14b-bidirectional",
            heads=DIT.heads,
            assets=str(assets),
        ),
    }
    for name, found in sources.items():
        write.to_bundle(found, tmp_path / name, dtype="keep")
    world, teacher = sources["teacher"].config, str(tmp_path / "teacher")
    networks = {"world": dataclasses.asdict(world.network)}
    mesh = make_mesh(MeshConfig())

    def run(stage: str, init: str, **fields) -> TrainConfig:
        values = lingbot2.get_config(stage).to_dict() | fields
        values |= {"init": str(tmp_path / init), "codec": teacher, "size": (32, 32), "curriculum": ()}
        values["world"] |= {"networks": networks, "codec": None, "text": None}
        values["data"] |= {"frames": 29, "batch": 1}
        config = resolve(build(TrainConfig, json.loads(json.dumps(values))))
        config.check_crops()
        return config

    score = {"shortest": 2, "window": 1, "gradient_chunks": 1}
    distill = run("distill", "causal", teacher=teacher, teachers=networks, distill=score)
    causal = run("causal", "causal")
    for config, names in (
        (run("action", "teacher"), {"world"}),
        (causal, {"world"}),
        (distill, {"world", "real", "fake"}),
    ):
        made = read_init(config, mesh)
        assert made.keys() == names
        for arrays, entry in itertools.product(made.values(), names_dit.dit_table(DIT)):
            ours = np.asarray(arrays[entry.ours])
            for layer in layers_of(entry, ours.shape):
                (value,) = entry.to_published(ours if layer is None else ours[layer])
                np.testing.assert_array_equal(value, TENSORS[part_names(entry, layer)[0]])
    encode, objective = encode_program(causal, mesh), objective_of(causal)
    with jax.set_mesh(mesh):
        encoded = jax.eval_shape(encode.fn, *encode.args)
        step = make_step(objective, causal, mesh, objective.updates(0), encoded)
        state, metrics = jax.eval_shape(step.fn, *step.args)
    assert "loss" in metrics and state.params.keys() == {"world"}


@pytest.mark.parametrize("layout", ["transformers", "transformer_causal", "small", "copy"])
def test_there_and_back(assets, tmp_path, layout):
    """To a bundle and to a published folder: every tensor of the transformer has its bits, the world its sampling."""
    hints = {}
    if layout == "small":
        place, hints = small(tmp_path / "small"), {"heads": DIT.heads, "assets": str(assets)}
    elif layout == "copy":
        place = diffusers_copy(assets)
    else:
        place = fast_14b(assets, layout, "WanXModel" if layout == "transformers" else "WanModelCausal")
    first = contents.look(str(place), **hints)
    write.to_bundle(first, tmp_path / "bundle", dtype="keep")
    assert find(tmp_path / "bundle").config == first.config
    write.to_published(contents.look(str(tmp_path / "bundle")), tmp_path / "back")
    (made,) = (p.parent for p in (tmp_path / "back").glob("*/config.json"))
    back = {name: t for file in made.glob("*.safetensors") for name, t in load_file(file).items()}
    assert back.keys() == TENSORS.keys()
    assert all(back[name].tobytes() == TENSORS[name].tobytes() for name in back)
    if layout.startswith("transformer"):
        assert (
            made.name == layout and contents.look(str(tmp_path / "back")).config.causal == first.config.causal
        )
