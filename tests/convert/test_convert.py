"""Conversion: round trips, what is refused, the plan of the published sizes."""

import json
import pathlib
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from safetensors.numpy import load_file, save_file

from experiments import convert as cli
from lingbot_jax.config import ConfigError
from lingbot_jax.convert import folders, names_dit, names_vae, write
from lingbot_jax.convert.folders import TEXT_FILE, VAE_FILE, parameter_shapes
from lingbot_jax.convert.names import Entry, expand
from lingbot_jax.convert.read import Arrays, fill, open_safetensors
from lingbot_jax.models import params
from lingbot_jax.models.config import W14B, DiTConfig, UMT5Config, VAEConfig
from lingbot_jax.models.dit import WorldDiT
from lingbot_jax.models.vae import WanVAE
from lingbot_jax.serve import bundle
from tests.convert import checkpoints
from tests.convert.checkpoints import DIT, TEXT, VAE


def find(folder: pathlib.Path, **options) -> folders.Checkpoint:
    return folders.find(folder, vae=VAE, text=TEXT, **options)


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    bits = lambda x: (x.dtype, x.shape, x.tobytes())
    return a.keys() == b.keys() and all(bits(a[name]) == bits(b[name]) for name in a)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[pathlib.Path, dict[str, dict[str, np.ndarray]]]:
    folder = tmp_path_factory.mktemp("checkpoints") / "lingbot"
    return folder, checkpoints.write_published(folder)


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("bundles") / "bundle"
    write.to_bundle(find(published[0]), out, dtype="keep")
    return out


def test_round_trip_is_bit_identical(published, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "SHARD_BYTES", 40_000)
    write.to_published(converted, tmp_path / "back")
    _, written = published
    for name in ("high_noise_model", "low_noise_model"):
        source = open_safetensors(tmp_path / "back" / name)
        assert len(list((tmp_path / "back" / name).glob("*.safetensors"))) > 2
        assert same_bits({key: source.read(key) for key in source.tensors}, written[name])
    for stem in (VAE_FILE, TEXT_FILE):
        assert same_bits(load_file(tmp_path / "back" / f"{stem}.safetensors"), written[stem])
    again = find(tmp_path / "back")
    assert [n.config for n in again.networks] == [n.config for n in find(published[0]).networks]
    assert again.tokenizer.read_text() == find(published[0]).tokenizer.read_text()


def test_bundle_restores_into_the_models(published, converted):
    manifest = bundle.read_manifest(converted)
    assert manifest.world == {"high": DIT, "low": DIT}
    assert (manifest.vae, manifest.text, manifest.causal) == (VAE, TEXT, None)
    assert (converted / bundle.TOKENIZER).is_file()
    template = params.abstract(lambda key: WorldDiT(DIT, key))
    model = bundle.restore(bundle.params_folder(converted, "low"), template, dtype=jnp.float32)
    expected = fill(template, names_dit.dit_table(DIT), Arrays(published[1]["low_noise_model"]))
    for ours, golden in zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True):
        assert isinstance(ours, jax.Array) and ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, golden)


def test_default_stores_bfloat16_but_the_vae(published, tmp_path):
    specs = {p.network.name: {s.dtype for s in p.specs.values()} for p in write.plan(find(published[0]))}
    bf16, f32 = {np.dtype(checkpoints.BF16)}, {np.dtype(np.float32)}
    assert specs == {"high": bf16, "low": bf16, "vae": f32, "text": bf16}


def test_restore_lists_all_that_does_not_fit(converted):
    other = DiTConfig(**{**vars(DIT), "ffn": 48, "control": "none"})
    template = params.abstract(lambda key: WorldDiT(other, key))
    with pytest.raises(ConfigError) as error:
        bundle.restore(bundle.params_folder(converted, "high"), template)
    assert "misshapen blocks.ffn.up.kernel [3, 24, 40], needs [3, 24, 48]" in str(error.value)
    assert "surplus control.patch.kernel" in str(error.value)


def test_all_wrong_tensors_are_named_and_nothing_is_written(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    tensors = checkpoints.write_published(source)["low_noise_model"]
    del tensors["blocks.1.ffn.0.bias"], tensors["head.modulation"]
    tensors["img_emb.proj.0.weight"] = np.zeros((3,), np.float32)
    tensors["blocks.2.cam_scale_layer.weight"] = np.zeros((24, 23), checkpoints.BF16)
    tensors["text_embedding.0.bias"] = np.zeros((24,), np.int8)
    tensors["blocks.0.modulation"] = tensors["blocks.0.modulation"].astype(np.float32)
    for file in (source / "low_noise_model").glob("*.safetensors*"):
        file.unlink()
    checkpoints.write_sharded(source / "low_noise_model", tensors, 2)
    with pytest.raises(ConfigError) as error:
        write.to_bundle(find(source), out)
    for part in (
        "low: missing blocks.1.ffn.0.bias [40]",
        "low: missing head.modulation [1, 2, 24]",
        "low: surplus img_emb.proj.0.weight [3]",
        "low: misshapen blocks.2.cam_scale_layer.weight [24, 23], needs [24, 24]",
        "low: unreadable text_embedding.0.bias: dtype I8",
        "low: mixed dtypes ['bfloat16', 'float32'] in blocks.modulation",
    ):
        assert part in str(error.value)
    assert str(error.value).startswith("6 tensors") and "high" not in str(error.value)
    assert list(tmp_path.iterdir()) == [source]


def test_failure_in_the_middle_leaves_nothing(published, tmp_path, monkeypatch):
    def fail(network: str, done: int) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write.to_bundle(find(published[0]), tmp_path / "out", progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_target_must_be_new(published, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="out = .*exists; choose another folder"):
        write.to_bundle(find(published[0]), tmp_path / "out")


def test_fast_checkpoint_has_one_transformer(tmp_path):
    place = tmp_path / "fast" / "any_name"
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(checkpoints.dit_json(DIT, _class_name="WanModelFast")))
    tensors = checkpoints.random_tensors(DIT, names_dit.dit_table(DIT), 0, np.float32)
    save_file(tensors, place / "diffusion_pytorch_model.safetensors")
    write.to_bundle(find(tmp_path / "fast"), tmp_path / "out")
    manifest = bundle.read_manifest(tmp_path / "out")
    assert list(manifest.world) == ["world"] and manifest.causal is not None and manifest.sample is None


def test_diffusers_layout_is_told_by_its_class(tmp_path):
    vae, transformer = tmp_path / "vae", tmp_path / "transformer"
    vae.mkdir(), transformer.mkdir()
    vae_json = {"_class_name": "AutoencoderKLWan", "base_dim": 4, "z_dim": 16, "dim_mult": [1, 2, 4, 4]}
    (vae / "config.json").write_text(json.dumps(vae_json))
    table = names_vae.diffusers(VAE)
    save_file(checkpoints.random_tensors(VAE, table, 0, np.float32), vae / "x.safetensors")
    plain = DiTConfig(**{**vars(DIT), "control": "none", "text_len": 512})
    dit_json = {
        "_class_name": "WanTransformer3DModel",
        "attention_head_dim": plain.head_dim,
        "num_attention_heads": plain.heads,
        "num_layers": plain.layers,
        "ffn_dim": plain.ffn,
        "freq_dim": plain.freq_dim,
        "text_dim": plain.text_dim,
        "in_channels": 36,
        "out_channels": 16,
        "patch_size": [1, 2, 2],
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "image_dim": None,
    }
    (transformer / "config.json").write_text(json.dumps(dit_json))
    table = names_dit.diffusers_dit_table(plain)
    save_file(checkpoints.random_tensors(plain, table, 0, np.float32), transformer / "x.safetensors")
    (tmp_path / "image_encoder").mkdir()
    (tmp_path / "image_encoder" / "config.json").write_text('{"architectures": ["CLIPVisionModel"]}')
    checkpoint = folders.find(tmp_path)
    assert checkpoint.others == ["image_encoder (CLIPVisionModel)"]
    found = {n.name: n for n in checkpoint.networks}
    assert found["high"].config == plain and found["vae"].config == VAE
    assert [len(p.specs) for p in write.plan(folders.find(tmp_path))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": "3"}, "num_layers = '3': must be int"),
        ({"dim": None}, "dim = None: must be int"),
        ({"qk_norm": False}, "qk_norm = False: only True is known"),
        ({"window_size": [5, 5]}, r"window_size = \[5, 5\]: only \[-1, -1\] is known"),
        ({"guidance_embed": True}, r"config.json = \['guidance_embed'\]: fields that we do not know"),
        ({"control_type": None}, "control_type = None: choose with --control"),
        ({"num_heads": 5}, "model.heads = 5"),
        ({"in_dim": 32}, "in_dim = 32: must be more than 2 x 16 for image-to-video"),
        ({"model_type": "t2v"}, "in_dim = 36: must be 16"),
        ({"_class_name": "FluxModel"}, "no checkpoint there"),
    ],
)
def test_config_is_read_strictly(tmp_path, changes, message):
    place = tmp_path / "high_noise_model"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(checkpoints.dit_json(DIT, **changes)))
    save_file(
        {"patch_embedding_wancamctrl.weight": np.zeros((24, 1536), np.float32)}, place / "x.safetensors"
    )
    with pytest.raises(ConfigError, match=message):
        folders.find(tmp_path)


def test_damaged_files_are_named(published, tmp_path):
    folder, written = published
    with pytest.raises(ConfigError, match="no such folder"):
        folders.find(tmp_path / "nowhere")
    cut = tmp_path / f"{VAE_FILE}.safetensors"
    cut.write_bytes((folder / f"{VAE_FILE}.safetensors").read_bytes()[:-100])
    with pytest.raises(ConfigError, match=f"{VAE_FILE}.safetensors: not a whole safetensors file"):
        folders.find(tmp_path)
    cut.unlink()
    checkpoints.write_sharded(tmp_path, written["high_noise_model"], 2)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["ghost"] = values["weight_map"].pop("head.modulation")
    index.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="disagree: head.modulation is in .*ghost is not in"):
        open_safetensors(tmp_path)


def test_pth_without_pytorch_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / f"{VAE_FILE}.pth").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"needs PyTorch; pip install 'lingbot_jax\[convert\]'"):
        folders.find(tmp_path)


def test_manifest_of_another_version(tmp_path):
    (tmp_path / "bundle.json").write_text(json.dumps({"format": 99, "strange": 1}))
    with pytest.raises(ConfigError, match="bundle.format = 99: this version reads 1"):
        bundle.read_manifest(tmp_path)


def sparse_checkpoint(folder: pathlib.Path, config: DiTConfig) -> None:
    """A full-size transformer whose data is a hole in the file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(checkpoints.dit_json(config)))
    header, offset = {}, 0
    for name, slot in expand(names_dit.dit_table(config), parameter_shapes(config)).items():
        end = offset + 2 * int(np.prod(slot.shape))
        header[name] = {"dtype": "BF16", "shape": list(slot.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with open(folder / "diffusion_pytorch_model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


def test_plan_of_the_published_size(tmp_path):
    sparse_checkpoint(tmp_path / "cam" / "high_noise_model", W14B)
    sparse_checkpoint(tmp_path / "wan" / "high_noise_model", DiTConfig(**{**vars(W14B), "control": "none"}))
    (cam,), (wan,) = (write.plan(folders.find(tmp_path / name)) for name in ("cam", "wan"))
    assert "18.54B parameters, bfloat16 37.09 GB" in str(cam)
    assert "14.29B parameters, bfloat16 28.58 GB" in str(wan)
    # Per layer: attention 8 D^2, FFN 2 D x 13824, camera 4 D^2 (FACTS), and what is small beside that.
    dense = 40 * (8 * 5120**2 + 2 * 5120 * 13824)
    assert 0 < wan.parameters - dense < 0.02 * dense
    assert 0 < cam.parameters - wan.parameters - 40 * 4 * 5120**2 < 0.02 * dense


def test_published_encoders_have_their_sizes():
    count = lambda config: sum(int(np.prod(shape)) for shape in parameter_shapes(config).values())
    assert count(VAEConfig()) == 126_892_531  # of Wan2.1_VAE.pth
    d, f = 4096, 10240
    assert count(UMT5Config()) == 256384 * d + 24 * (4 * d * d + 3 * d * f + 32 * 64 + 2 * d) + d


def test_command(published, tmp_path, capsys):
    out, back = tmp_path / "bundle", tmp_path / "back"
    arguments = ["convert", f"--source={published[0] / 'low_noise_model'}", f"--out={out}"]
    flags.FLAGS([*arguments, "--dry_run"])
    cli.main()
    printed = capsys.readouterr().out
    assert printed.startswith("low: ") and " bfloat16 0.00 GB\ntotal: 0.00B" in printed and not out.exists()
    flags.FLAGS([*arguments, "--nodry_run"])
    cli.main()
    assert bundle.read_manifest(out).world == {"low": DIT}
    flags.FLAGS(["convert", f"--source={out}", f"--out={back}", "--to=published"])
    cli.main()
    tensors = load_file(back / "low_noise_model" / "diffusion_pytorch_model.safetensors")
    assert same_bits(tensors, published[1]["low_noise_model"])


def test_table_and_model_must_agree():
    with pytest.raises(ValueError, match=r"not in the table \['b'\]"):
        expand([Entry("a", "x")], {"a": (2,), "b": (3,)})
    with pytest.raises(ValueError, match=r"not in the model \['c'\]"):
        expand([Entry("a", "x"), Entry("c", "y")], {"a": (2,)})
    with pytest.raises(ValueError, match="x fills both a and b"):
        expand([Entry("a", "x"), Entry("b", "x")], {"a": (2,), "b": (3,)})


def test_entry_of_several_published_tensors():
    entry = Entry("qkv", ("q.{n}", "k.{n}"), "s o i -> i (s o)", (("s", 2),))
    parts = [np.arange(12.0).reshape(3, 4) + 100 * s for s in range(2)]
    ours = entry.to_ours(parts)
    assert ours.shape == (4, 6) and entry.published_shape(ours.shape) == (3, 4)
    np.testing.assert_array_equal(ours[:, 3:], parts[1].T)
    for back, part in zip(entry.to_published(ours), parts, strict=True):
        np.testing.assert_array_equal(back, part)


def test_fill_rejects_a_wrong_state_dict():
    tensors = checkpoints.random_tensors(VAE, names_vae.published(VAE), 0, np.float32)
    tensors["encoder.conv1.bias"] = np.zeros(5, np.float32)
    template = params.abstract(lambda key: WanVAE(VAE, key))
    with pytest.raises(ConfigError, match=r"misshapen encoder.conv1.bias \[5\], needs \[4\]"):
        fill(template, names_vae.published(VAE), Arrays(tensors))
