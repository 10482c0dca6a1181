"""Folders, runs and bundles into one another: nothing is lost, nothing is left behind, and mistakes are one line."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from safetensors.numpy import load_file

from experiments import convert as cli
from lingbot_jax.config import ConfigError
from lingbot_jax.convert import contents, names_dit, report, write
from lingbot_jax.convert.folders import NEGATIVE_PROMPT, TEXT_FILE, VAE_FILE
from lingbot_jax.convert.names import Entry, expand
from lingbot_jax.convert.read import Arrays, fill, open_safetensors
from lingbot_jax.models import params
from lingbot_jax.models.codec import LinearCodec
from lingbot_jax.models.config import LinearCodecConfig, NgramConfig, UMT5Config, VAEConfig
from lingbot_jax.parallel.mesh import MeshConfig, make_mesh
from lingbot_jax.worlds import storage
from lingbot_jax.worlds.checkpoints import Checkpoints
from lingbot_jax.worlds.config import BOUNDARY, CausalConfig, SampleConfig, WorldConfig
from lingbot_jax.worlds.open import open_world, params_folder, write_codec
from lingbot_jax.worlds.world import template
from tests.convert import published
from tests.convert.published import BF16, Sizes, write_published

SIZES = Sizes()
EXPERTS = ("high_noise_model", "low_noise_model")


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    bits = lambda x: (x.dtype, x.shape, x.tobytes())
    return a.keys() == b.keys() and all(bits(a[name]) == bits(b[name]) for name in a)


def tensors_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    source = open_safetensors(folder)
    return {key: source.read(key) for key in source.tensors}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> tuple[pathlib.Path, dict[str, dict[str, np.ndarray]]]:
    made = tmp_path_factory.mktemp("checkpoints") / "lingbot"
    return made, write_published(made)


@pytest.fixture(scope="module")
def bundle(folder, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("bundles") / "bundle"
    write.to_bundle(contents.look(str(folder[0])), out, dtype="keep")
    return out


def test_round_trip_is_bit_identical(folder, bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "SHARD_BYTES", 100_000)
    write.to_published(contents.look(str(bundle)), tmp_path / "back")
    for name in EXPERTS:
        assert len(list((tmp_path / "back" / name).glob("*.safetensors"))) > 2
        assert same_bits(tensors_of(tmp_path / "back" / name), folder[1][name])
    for stem in (VAE_FILE, TEXT_FILE):
        assert same_bits(load_file(tmp_path / "back" / f"{stem}.safetensors"), folder[1][stem])
    again, first = contents.look(str(tmp_path / "back")), contents.look(str(folder[0]))
    assert again.config == first.config
    assert again.tokenizer.read_text() == first.tokenizer.read_text()


def test_a_bundle_is_a_whole_world(folder, bundle):
    world = open_world(bundle, make_mesh(MeshConfig()), dtype=jnp.float32)
    config = world.config
    assert config.networks == {"high": SIZES.dit, "low": SIZES.dit}
    assert (config.codec, config.text, config.boundary) == (SIZES.vae, SIZES.text, BOUNDARY)
    assert config.sample == SampleConfig(negative_prompt=NEGATIVE_PROMPT) and config.causal is None
    expected = fill(template(SIZES.dit), names_dit.dit_table(SIZES.dit), Arrays(folder[1][EXPERTS[1]]))
    ours = params.arrays_of(world.networks["low"])
    for path, golden in params.arrays_of(expected).items():
        assert ours[path].dtype == jnp.float32
        np.testing.assert_array_equal(ours[path], golden)
    assert world.encode_text(["a narrow corridor", ""]).shape == (2, SIZES.text_len, SIZES.text_dim)


def test_default_stores_bfloat16_but_the_codec(folder):
    found = contents.look(str(folder[0]))
    for part in found.parts:
        stored = {spec.dtype for spec in write.cast(part, "bfloat16").specs.values()}
        assert stored == {np.dtype(np.float32 if part.name == "codec" else BF16)}


def write_run(
    run: pathlib.Path, networks: tuple[str, ...], encoders: pathlib.Path, world: WorldConfig, seed: int = 0
) -> dict[str, dict[str, np.ndarray]]:
    """A run as training leaves it, whose averaged parameters are not its last ones. Returns the averaged ones."""
    rng = np.random.default_rng(seed)
    shapes = {p: a.shape for p, a in params.arrays_of(template(world.network)).items()}
    draw = lambda: {
        name: {p: rng.standard_normal(s, np.float32) for p, s in shapes.items()} for name in networks
    }
    ema = draw()
    world = dataclasses.replace(world, networks={name: world.network for name in networks})
    run.mkdir()
    values = {"world": dataclasses.asdict(world), "codec": str(encoders)}
    (run / "config.json").write_text(json.dumps(values))
    with Checkpoints(run) as checkpoints:
        checkpoints.save(5, {"params": draw(), "ema": ema})
    return ema


@pytest.fixture(scope="module")
def runs(bundle, tmp_path_factory) -> tuple[pathlib.Path, dict[str, dict[str, np.ndarray]]]:
    """Two runs, `high` and `low`, on the bundle's codec and text encoder."""
    place, averaged = tmp_path_factory.mktemp("runs"), {}
    world = dataclasses.replace(contents.look(str(bundle)).config, boundary=0.9)
    for seed, name in enumerate(("high", "low")):
        averaged |= write_run(place / name, (name,), bundle, world, seed)
    return place, averaged


def test_two_runs_become_one_bundle_that_stands_alone(runs, folder, tmp_path):
    place, averaged = runs
    found = contents.look(f"{place / 'low'},{place / 'high'}")
    assert [part.name for part in found.parts] == ["high", "low", "codec", "text"]
    write.to_bundle(found, tmp_path / "bundle")
    world = open_world(tmp_path / "bundle", make_mesh(MeshConfig()))
    assert list(world.config.networks) == ["high", "low"] and world.config.boundary == 0.9
    for name, module in world.networks.items():
        for path, array in params.arrays_of(module).items():
            np.testing.assert_array_equal(array, averaged[name][path].astype(BF16))
    vae = storage.Reader(params_folder(tmp_path / "bundle", "codec"))
    assert {spec.dtype for spec in vae.specs.values()} == {np.dtype(np.float32)}
    assert not contents.look(str(tmp_path / "bundle")).notes


def test_runs_become_a_published_folder(runs, folder, tmp_path):
    place, averaged = runs
    found = contents.look(f"high={place / 'high'},low={place / 'low'}")
    write.to_published(found, tmp_path / "out", "float32")
    bias = tensors_of(tmp_path / "out" / "high_noise_model")["blocks.1.ffn.0.bias"]
    np.testing.assert_array_equal(bias, averaged["high"]["blocks.ffn.up.bias"][1])
    assert same_bits(load_file(tmp_path / "out" / f"{VAE_FILE}.safetensors"), folder[1][VAE_FILE])


def test_one_expert_alone_is_warned_of(runs):
    (note,) = contents.look(str(runs[0] / "low")).notes
    assert note.startswith(
        "missing the other expert: low alone would be used at every noise level; give both"
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("high={0}/low,low={0}/low", "{0}/low': has low, not high"),
        ("{0}/low,{0}/low", "has low and low: must be one high and one low"),
        ("high={0}/high,low={1}", "world.boundary differs: 0.9 in {0}/high, 0.947 in {1}"),
        ("high={0}/high,{1}", "has high and low, not one expert; give two as high=FOLDER,low=FOLDER"),
        ("{0}/high,{0}/low,{0}/low", "must be a folder, or high=FOLDER,low=FOLDER"),
        ("{0}/nowhere", "no such folder"),
        ("high={0}/nowhere,low={0}/low", "no such folder"),
    ],
)
def test_two_that_do_not_belong_together(runs, bundle, source, message):
    with pytest.raises(ConfigError) as error:
        contents.look(source.format(runs[0], bundle))
    assert message.format(runs[0], bundle) in str(error.value) and "\n" not in str(error.value)


def test_two_codecs_of_one_size_differ(runs, folder, tmp_path):
    other = tmp_path / "other"
    write_published(other, seed=1)
    write.to_bundle(contents.look(str(other)), tmp_path / "bundle")
    world = dataclasses.replace(contents.look(str(other)).config, boundary=0.9)
    write_run(tmp_path / "low", ("low",), tmp_path / "bundle", world)
    with pytest.raises(ConfigError, match="the two codecs differ: experts of one world see the same latents"):
        contents.look(f"high={runs[0] / 'high'},low={tmp_path / 'low'}")


def test_a_tiny_run_becomes_a_bundle_and_nothing_published(tmp_path):
    codec = LinearCodec(LinearCodecConfig(channels=4), jnp.zeros((2,), jnp.uint32))
    write_codec(tmp_path / "codec", codec)
    text = NgramConfig(dim=16, length=8)
    dit = dataclasses.replace(SIZES.dit, text_dim=16, text_len=8)
    world = WorldConfig(networks={"world": dit}, codec=codec.config, text=text, sample=SampleConfig())
    averaged = write_run(tmp_path / "run", ("world",), tmp_path / "codec", world)
    found = contents.look(str(tmp_path / "run"))
    write.to_bundle(found, tmp_path / "bundle", "keep")
    opened = open_world(tmp_path / "bundle", make_mesh(MeshConfig()))
    assert opened.config == world
    for path, array in params.arrays_of(opened.networks["world"]).items():
        np.testing.assert_array_equal(array, averaged["world"][path])
    for path, array in params.arrays_of(opened.codec).items():
        np.testing.assert_array_equal(array, params.arrays_of(codec)[path])
    with pytest.raises(ConfigError, match="its text is 'ngram', and published folders know only umT5"):
        write.to_published(found, tmp_path / "back")
    notes = contents.look(str(tmp_path / "codec")).notes
    assert notes == ("missing: networks", "missing: text")


def test_nan_is_refused_and_nothing_is_left(folder, tmp_path):
    made = tmp_path / "source"
    tensors = write_published(made)["low_noise_model"]
    tensors["blocks.1.ffn.0.bias"][7] = np.nan
    for file in (made / "low_noise_model").glob("*.safetensors*"):
        file.unlink()
    published.write_sharded(made / "low_noise_model", tensors, 2)
    with pytest.raises(ConfigError, match=r"low: layer 1 of blocks.ffn.up.bias holds NaN"):
        write.to_bundle(contents.look(str(made)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == [made]


@pytest.mark.parametrize("kind", [np.float32, np.float16, BF16])
def test_what_is_finite(kind):
    fine = np.array([0, -1, np.finfo(kind).max if kind != BF16 else 3e38], kind)
    write._check_finite(fine, "high", "x", None)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ConfigError, match="high: x holds NaN"):
            write._check_finite(np.array([0, bad], kind), "high", "x", None)


def test_failure_in_the_middle_leaves_nothing(folder, tmp_path):
    def fail(network: str, done: int) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write.to_bundle(contents.look(str(folder[0])), tmp_path / "out", progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_conversion_left_is_swept(folder, tmp_path):
    """SIGKILL in the middle of writing; the next conversion into the same folder clears up."""
    killed = (
        "import os, signal; from lingbot_jax.convert import contents, write\n"
        f"found = contents.look({str(folder[0])!r})\n"
        f"write.to_bundle(found, {str(tmp_path / 'out')!r}, progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    assert subprocess.run([sys.executable, "-c", killed], env=environment).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    write.to_bundle(contents.look(str(folder[0])), tmp_path / "other")
    assert list(tmp_path.iterdir()) == [tmp_path / "other"]


def test_target_must_be_new(folder, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="out = .*exists; choose another folder"):
        write.to_bundle(contents.look(str(folder[0])), tmp_path / "out")


def test_fast_checkpoint_has_one_transformer(tmp_path):
    write_published(tmp_path / "fast", experts=("any_name",))
    found = contents.look(str(tmp_path / "fast"))
    assert list(found.config.networks) == ["world"] and found.config.causal == CausalConfig()
    assert found.config.sample is None
    write.to_bundle(found, tmp_path / "bundle")
    write.to_published(contents.look(str(tmp_path / "bundle")), tmp_path / "back")
    values = json.loads((tmp_path / "back" / "world_model" / "config.json").read_text())
    assert values["_class_name"] == "WanModelFast"


def test_bundle_of_format_1_says_what_to_do(tmp_path):
    (tmp_path / "bundle.json").write_text(json.dumps({"format": 1, "world": {}}))
    with pytest.raises(
        ConfigError, match="bundle format 1, this version reads 2; convert the checkpoint again: "
    ):
        contents.look(str(tmp_path))


def test_command(folder, tmp_path, capsys):
    out, back = tmp_path / "bundle", tmp_path / "back"
    arguments = ["convert", f"--source={folder[0]}", f"--out={out}"]
    flags.FLAGS([*arguments, "--dry_run"])
    cli.main()
    printed = capsys.readouterr().out
    assert printed.startswith(
        f"{folder[0]}: published checkpoint\nhigh: dim 64, layers 2, heads 4, ffn 128, "
    )
    assert (
        "control cam; 283.02K parameters in 91 tensors, bfloat16 566.05 kB\n" in printed and not out.exists()
    )
    flags.FLAGS([*arguments, "--noinspect"])
    cli.main()
    capsys.readouterr()
    card = (out / "README.md").read_text()
    (out / "README.md").write_text(f"{card}\nA card may be edited.\n")
    flags.FLAGS(["convert", f"--source={out}", "--inspect"])
    cli.main()
    assert f"{out}: bundle\n" in capsys.readouterr().out
    flags.FLAGS(["convert", f"--source={out}", f"--out={back}", "--to=published", "--noinspect"])
    cli.main()
    assert (
        "How to use it" in (out / "README.md").read_text()
        and "published names" in (back / "README.md").read_text()
    )
    tensors = load_file(back / "low_noise_model" / "diffusion_pytorch_model.safetensors")
    assert same_bits(tensors, folder[1]["low_noise_model"])


def test_amounts():
    assert [report.amount(n) for n in (18_540_000_000, 283_020, 1_500_000, 12)] == [
        "18.54B",
        "283.02K",
        "1.50M",
        "12",
    ]
    assert [report.amount(n, "B") for n in (37_090_000_000, 999)] == ["37.09 GB", "999 B"]


def test_published_encoders_have_their_sizes():
    count = lambda config: params.count(template(config))
    assert count(VAEConfig()) == 126_892_531  # of Wan2.1_VAE.pth
    d, f = 4096, 10240
    assert count(UMT5Config()) == 256384 * d + 24 * (4 * d * d + 3 * d * f + 32 * 64 + 2 * d) + d


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
