"""Checkpoint folders: sizes come from their own files, configs are read strictly, what is wrong is one short line."""

import dataclasses
import json
import os
import pathlib
import struct
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lingbot_jax.config import ConfigError
from lingbot_jax.convert import contents, folders, names_dit, names_text, names_vae, report
from lingbot_jax.convert.folders import TEXT_FILE, VAE_FILE
from lingbot_jax.convert.names import expand
from lingbot_jax.convert.read import Arrays, fill, open_safetensors
from lingbot_jax.models import params
from lingbot_jax.models.config import W14B, DiTConfig, UMT5Config, VAEConfig
from lingbot_jax.worlds.config import BOUNDARY, CausalConfig
from lingbot_jax.worlds.world import template
from tests.convert import published
from tests.convert.published import (
    Sizes,
    dit_json,
    random_tensors,
    write_json,
    write_published,
    write_sharded,
)

DIT = Sizes().dit
INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> tuple[pathlib.Path, dict[str, dict[str, np.ndarray]]]:
    made = tmp_path_factory.mktemp("checkpoints") / "lingbot"
    return made, write_published(made)


@pytest.fixture
def expert(tmp_path) -> pathlib.Path:
    """A transformer folder whose tensors may be replaced."""
    write_published(tmp_path, experts=("high_noise_model",))
    return tmp_path / "high_noise_model"


def test_sizes_of_encoders_are_read_off_their_tensors(tmp_path):
    vae = VAEConfig(
        width=4,
        mults=(1, 3, 2),
        blocks=1,
        time_strides=(True, False),
        channels=5,
        mean=(0,) * 5,
        std=(1,) * 5,
    )
    text = UMT5Config(vocab=31, dim=24, heads=3, head_dim=4, ffn=40, layers=3, buckets=16)
    save_file(
        random_tensors(vae, names_vae.published(vae), 0, np.float32), tmp_path / f"{VAE_FILE}.safetensors"
    )
    save_file(
        random_tensors(text, names_text.published(), 0, np.float32), tmp_path / f"{TEXT_FILE}.safetensors"
    )
    found = contents.look(str(tmp_path))
    assert (found.config.codec, found.config.text) == (vae, text)
    assert not any(part.wrong for part in found.parts)


@pytest.mark.parametrize(("control", "stated"), [("act", None), ("cam", None), ("cam_act", "cam_act")])
def test_control_is_read_off_the_width_of_its_layer(tmp_path, control, stated):
    config = dataclasses.replace(DIT, control=control)
    (tmp_path / "high_noise_model").mkdir()
    write_json(tmp_path / "high_noise_model" / "config.json", dit_json(config, control_type=stated))
    tensors = random_tensors(config, names_dit.dit_table(config), 0, np.float32)
    write_sharded(tmp_path / "high_noise_model", tensors, 1)
    assert folders.find(tmp_path).config.network == config


def test_rollout_of_a_fast_model(tmp_path):
    write_published(tmp_path, experts=("any",))
    values = dit_json(DIT, _class_name="WanModelFast", local_attn_size=12, sink_size=3)
    write_json(tmp_path / "any" / "config.json", values)
    assert folders.find(tmp_path).config.causal == CausalConfig(window=12, sink=3)
    write_json(tmp_path / "any" / "config.json", values | {"sink_size": 11})
    with pytest.raises(ConfigError, match="local_attn_size, sink_size = 12, 11: .*must hold sink"):
        folders.find(tmp_path)


def diffusers_folder(place: pathlib.Path, experts: int = 2, **transformer) -> tuple[DiTConfig, VAEConfig]:
    """A diffusers folder without model_index.json, scheduler and text encoder, of a codec with another stride."""
    vae = VAEConfig(
        width=4, mults=(1, 2), blocks=1, time_strides=(True,), channels=4, mean=(0,) * 4, std=(1,) * 4
    )
    dit = dataclasses.replace(DIT, control="none", text_len=512, spatial_stride=2, mask_channels=2)
    (place / "vae").mkdir()
    vae_json = {"_class_name": "AutoencoderKLWan", "base_dim": 4, "z_dim": 4, "dim_mult": [1, 2]}
    vae_json |= {"num_res_blocks": 1, "temperal_downsample": [True], "scale_factor_spatial": 8}
    vae_json |= {
        "latents_mean": list(VAEConfig().mean),
        "latents_std": list(VAEConfig().std),
    }  # as its constructor
    write_json(place / "vae" / "config.json", vae_json)
    save_file(random_tensors(vae, names_vae.diffusers(vae), 0, np.float32), place / "vae" / "x.safetensors")
    dit_json = {
        "_class_name": "WanTransformer3DModel",
        "attention_head_dim": dit.head_dim,
        "num_attention_heads": dit.heads,
        "num_layers": dit.layers,
        "ffn_dim": dit.ffn,
        "freq_dim": dit.freq_dim,
        "text_dim": dit.text_dim,
        "in_channels": dit.in_channels,
        "out_channels": 4,
        "patch_size": [1, 2, 2],
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "image_dim": None,
    }
    for seed, name in enumerate(("transformer", "transformer_2")[:experts]):
        (place / name).mkdir()
        write_json(place / name / "config.json", dit_json | transformer)
        tensors = random_tensors(dit, names_dit.diffusers_dit_table(dit), seed, np.float32)
        save_file(tensors, place / name / "x.safetensors")
    (place / "image_encoder").mkdir()
    write_json(place / "image_encoder" / "config.json", {"architectures": ["CLIPVisionModel"]})
    return dit, vae


def test_diffusers_folder_alone_takes_what_it_does_not_say_from_the_published_model(tmp_path):
    dit, vae = diffusers_folder(tmp_path)
    found = folders.find(tmp_path)
    assert found.others == ["image_encoder (CLIPVisionModel)"]
    assert found.config.networks == {"high": dit, "low": dit} and found.config.codec == vae
    assert (found.config.boundary, found.config.sample.shift) == (BOUNDARY, 10.0)
    looked = contents.look(str(tmp_path))
    looked.check()
    assert looked.notes == ("left out: image_encoder (CLIPVisionModel)", "missing: text")


def test_diffusers_folder_with_its_pipeline(tmp_path):
    diffusers_folder(tmp_path)
    (tmp_path / "scheduler").mkdir()
    write_json(tmp_path / "model_index.json", {"boundary_ratio": 0.9})
    write_json(tmp_path / "scheduler" / "scheduler_config.json", {"flow_shift": 3.0})
    config = folders.find(tmp_path).config
    assert (config.boundary, config.sample.shift) == (0.9, 3.0)
    write_json(tmp_path / "model_index.json", {"boundary_ratio": 1.9})
    with pytest.raises(ConfigError, match=f"{tmp_path}: boundary_ratio = 1.9: must be less than 1"):
        folders.find(tmp_path)


def test_pipeline_of_one_transformer_is_no_expert(tmp_path):
    diffusers_folder(tmp_path, experts=1)
    assert list(folders.find(tmp_path).config.networks) == ["world"]
    write_json(tmp_path / "model_index.json", {"boundary_ratio": 0.9})
    assert list(folders.find(tmp_path).config.networks) == ["high"]


def test_either_name_of_the_tied_embedding(tmp_path):
    text = Sizes().text
    values = {"d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 64, "num_layers": 2, "vocab_size": 64}
    write_json(tmp_path / "config.json", {"architectures": ["UMT5EncoderModel"], **values})
    tensors = random_tensors(text, names_text.transformers(), 0, np.float32)
    both = tensors | {names_text.TIED: tensors["shared.weight"]}
    for saved in (tensors, both, {k: v for k, v in both.items() if k != "shared.weight"}):
        save_file(saved, tmp_path / "model.safetensors")
        (part,) = contents.look(str(tmp_path)).parts
        assert not part.wrong
        np.testing.assert_array_equal(part.open()("embedding", None), tensors["shared.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": "3"}, "num_layers = '3': must be an integer"),
        ({"num_layers": 10**12}, "num_layers = 1000000000000: must be less than or equal to 4096"),
        ({"text_len": 10**12}, "text_len = 1000000000000: must be an integer in 1..2.20"),
        ({"eps": float("nan")}, "eps = nan: must be "),
        ({"dim": None}, "dim: missing"),
        ({"dim": -1}, "dim = -1: must be greater than 0"),
        ({"qk_norm": False}, "qk_norm = False: only True is known"),
        ({"window_size": [5, 5]}, r"window_size = \[5, 5\]: only \[-1, -1\] is known"),
        ({"patch_size": ["1", {}, 2]}, r"patch_size\[0\] = '1': must be an integer"),
        ({"guidance_embed": True}, r"config.json = \['guidance_embed'\]: fields that we do not know"),
        ({"control_type": [5]}, r"control_type = \[5\]: choose with --control"),
        ({"cam_channels": {}}, "control_type = '{} channels': choose with --control"),
        ({"num_heads": 5}, "num_heads = 5: must divide dim = 64"),
        ({"in_dim": 8}, "in_dim = 8: must be more than 2 x 4 for image-to-video"),
        ({"in_dim": 13}, "networks.high.mask_channels = 5: must be 4, the codec's stride in time"),
        ({"model_type": "t2v"}, "in_dim = 12: must be 4"),
    ],
)
def test_config_is_read_strictly(expert, changes, message):
    write_json(expert / "config.json", dit_json(DIT, **changes))
    with pytest.raises(ConfigError, match=message) as error:
        contents.look(str(expert.parent))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b'{"weight_map": 5}', "weight_map must be a group of tensor names"),
        (b'{"weight_map": null}', "weight_map must be a group of tensor names"),
        (b'{"weight_map": []}', "weight_map must be a group of tensor names"),
        (b'{"weight_map": {}}', "weight_map must be a group of tensor names"),
        (b'{"weight_map": {"x": 5}}', "weight_map.x = '5': must be the name of a file beside it"),
        (
            b'{"weight_map": {"x": "/proc/self/mem"}}',
            "weight_map.x = '/proc/self/mem': must be the name of a file",
        ),
        (b'{"weight_map": {"x": "../y.safetensors"}}', "must be the name of a file beside it"),
        (b'{"weight_map": {"x": "pipe"}}', "pipe: no such file"),
        (b'{"weight_map": {"x": "memory"}}', "memory: not a whole safetensors file"),
        (b'{"weight_map": ' * 100_000, "nested too deeply|not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply|not JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff\xfe", "not JSON"),
        (b" " * (65 << 20), "is larger than 64 MiB"),
    ],
)
def test_hostile_index(expert, index, message):
    os.mkfifo(expert / "pipe")
    (expert / "memory").symlink_to("/proc/self/mem")
    (expert / INDEX).write_bytes(index)
    start = time.process_time()
    with pytest.raises(ConfigError, match=message) as error:
        contents.look(str(expert.parent))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert time.process_time() - start < 30  # of this process: bounded work, not speed


def test_a_depth_that_the_tensors_do_not_have_is_found_before_a_model_of_it_is_made(expert):
    write_json(expert / "config.json", dit_json(dataclasses.replace(DIT, layers=4096)))
    with pytest.raises(ConfigError, match="high: 1 tensors do not fit: 4096 blocks in 91 tensors"):
        contents.look(str(expert.parent)).check()


def test_mismatches_are_counted_and_the_first_five_named(expert):
    tensors = published.random_tensors(DIT, names_dit.dit_table(DIT), 0, published.BF16)
    del tensors["blocks.1.ffn.0.bias"], tensors["head.modulation"]
    tensors["img_emb.proj.0.weight"] = np.zeros((3,), np.float32)
    tensors["blocks.1.cam_scale_layer.weight"] = np.zeros((24, 23), published.BF16)
    tensors["text_embedding.0.bias"] = np.zeros((64,), np.int8)
    tensors["blocks.0.modulation"] = tensors["blocks.0.modulation"].astype(np.float32)
    for file in expert.glob("*.safetensors*"):
        file.unlink()
    write_sharded(expert, tensors, 2)
    found = contents.look(str(expert.parent))
    wrong = {part.name: part.wrong for part in found.parts}["high"]
    assert set(wrong) == {
        "missing blocks.1.ffn.0.bias [128]",
        "missing head.modulation [1, 2, 64]",
        "surplus img_emb.proj.0.weight [3]",
        "misshapen blocks.1.cam_scale_layer.weight [24, 23], needs [64, 64]",
        "unreadable text_embedding.0.bias: dtype I8, needs one of F32, F16, BF16",
        "mixed dtypes ['bfloat16', 'float32'] in blocks.modulation",
    }
    with pytest.raises(ConfigError) as error:
        found.check()
    assert f"high: 6 tensors do not fit: {wrong[0]}; " in str(error.value)
    assert str(error.value).endswith(f"{wrong[4]} and 1 more") and wrong[5] not in str(error.value)
    assert "of which 6 do not fit" in report.describe(found)[1]


def test_a_text_encoder_needs_its_tokenizer(expert):
    (expert.parent / published.TOKENIZER_FILE).unlink()
    os.mkfifo(expert.parent / published.TOKENIZER_FILE)
    with pytest.raises(ConfigError, match="text: missing its tokenizer, google/umt5-xxl/tokenizer.json or "):
        contents.look(str(expert.parent)).check()


def test_damaged_files_are_named(folder, tmp_path):
    made, written = folder
    cut = tmp_path / f"{VAE_FILE}.safetensors"
    cut.write_bytes((made / f"{VAE_FILE}.safetensors").read_bytes()[:-100])
    with pytest.raises(ConfigError, match=f"{VAE_FILE}.safetensors: not a whole safetensors file"):
        contents.look(str(tmp_path))
    save_file({"x": np.zeros(3, np.float32)}, cut)
    with pytest.raises(ConfigError, match="is not the published file of that name: it has no tensor"):
        contents.look(str(tmp_path))
    save_file(load_file(made / cut.name), cut, metadata={"config": "{"})
    with pytest.raises(ConfigError, match="its metadata has a config that is not JSON"):
        contents.look(str(tmp_path))
    cut.unlink()
    write_sharded(tmp_path, written["high_noise_model"], 2)
    values = json.loads((tmp_path / INDEX).read_text())
    values["weight_map"]["ghost"] = values["weight_map"].pop("head.modulation")
    write_json(tmp_path / INDEX, values)
    with pytest.raises(ConfigError, match="disagree: head.modulation is in .*ghost is not in"):
        open_safetensors(tmp_path)


def test_nothing_known(tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint there; expected high_noise_model/"):
        contents.look(str(tmp_path))
    write_json(tmp_path / "config.json", {"_class_name": "FluxModel"})
    with pytest.raises(ConfigError, match="_class_name = 'FluxModel': known are WanModel, "):
        contents.look(str(tmp_path))


def test_pth_without_pytorch_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / f"{VAE_FILE}.pth").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"needs PyTorch; pip install 'lingbot_jax\[convert\]'"):
        folders.find(tmp_path)


def sparse_checkpoint(folder: pathlib.Path, config: DiTConfig) -> None:
    """A full-size transformer whose data is a hole in the file."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", dit_json(config))
    shapes = {path: tuple(leaf.shape) for path, leaf in params.arrays_of(template(config)).items()}
    header, offset = {}, 0
    for name, slot in expand(names_dit.dit_table(config), shapes).items():
        end = offset + 2 * int(np.prod(slot.shape))
        header[name] = {"dtype": "BF16", "shape": list(slot.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with open(folder / "diffusion_pytorch_model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


def test_report_of_the_published_size(tmp_path):
    sparse_checkpoint(tmp_path / "cam" / "high_noise_model", W14B)
    sparse_checkpoint(tmp_path / "wan" / "high_noise_model", dataclasses.replace(W14B, control="none"))
    cam, wan = (contents.look(str(tmp_path / name)) for name in ("cam", "wan"))
    assert "18.54B parameters in 1421 tensors, bfloat16 37.09 GB" in report.describe(cam)[1]
    assert "14.29B parameters" in report.describe(wan)[1]
    # Per layer: attention 8 D^2, FFN 2 D x 13824, camera 4 D^2 (FACTS), and what is small beside that.
    dense = 40 * (8 * 5120**2 + 2 * 5120 * 13824)
    size, more = (report.parameters(found.parts[0]) for found in (wan, cam))
    assert 0 < size - dense < 0.02 * dense
    assert 0 < more - size - 40 * 4 * 5120**2 < 0.02 * dense


def test_fill_rejects_a_wrong_state_dict():
    vae = Sizes().vae
    tensors = random_tensors(vae, names_vae.published(vae), 0, np.float32)
    tensors["encoder.conv1.bias"] = np.zeros(5, np.float32)
    with pytest.raises(ConfigError, match=r"misshapen encoder.conv1.bias \[5\], needs \[8\]"):
        fill(template(vae), names_vae.published(vae), Arrays(tensors))
