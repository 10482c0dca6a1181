"""Latents made ahead of training are what the clips would have been encoded to, whoever made them and how often."""

import dataclasses
import multiprocessing
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import encode as experiment
from experiments.configs.schema import EncodeConfig
from lingbot_jax.config import ConfigError
from lingbot_jax.data import latents, records, schema
from lingbot_jax.data.config import DataConfig, MixtureConfig
from lingbot_jax.data.crops import crops, resize_crops
from lingbot_jax.data.encode import encode_clips
from lingbot_jax.data.loader import Dataset
from lingbot_jax.models import params
from lingbot_jax.models.config import ConvCodecConfig, LinearCodecConfig, NgramConfig, VAEConfig
from lingbot_jax.models.text import HashedNgramEncoder
from lingbot_jax.training.config import TaskConfig, ValidationConfig
from lingbot_jax.training.loop import train
from lingbot_jax.worlds import clips
from lingbot_jax.worlds.config import PoseConfig, WorldConfig
from lingbot_jax.worlds.open import write_codec
from lingbot_jax.worlds.world import template
from tests.data.clips import make_clip
from tests.training import micro

SIZE, STORED = (16, 24), (16, 32)  # pixels of the latents, and of the clips: they are scaled
LENGTHS = (21, 13, 17, 5, 13, 29)  # frames of the clips: one is too short for a crop
EVENTS = (
    schema.Event(0.2, 0.5, "The camera walks."),
    schema.Event(0.6, 9.0, "It is night.", kind="scene"),
)
TEXT = NgramConfig(dim=8, length=12)
CODECS = {
    "linear": LinearCodecConfig(channels=6),
    "conv": ConvCodecConfig(channels=6, width=8, blocks=1),
    "vae": VAEConfig(
        width=4, mults=(1, 1), blocks=1, time_strides=(True,), channels=2, mean=(0.1, -0.2), std=(1.5, 0.5)
    ),
}


def made_clip(number: int) -> schema.Clip:
    """A clip with random pictures, and captions of its own."""
    rng = np.random.default_rng(number)
    clip = make_clip(number, LENGTHS[number], STORED)
    told = schema.Captions("A walk.", f"Place {number % 2}.", EVENTS)
    return dataclasses.replace(clip, frames=rng.integers(0, 256, clip.frames.shape, np.uint8), captions=told)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips in two shards, and a bundle of each codec with random parameters."""
    folder = tmp_path_factory.mktemp("latents")
    (folder / "clips").mkdir()
    for shard, numbers in enumerate((range(3), range(3, 6))):
        path = folder / "clips" / records.shard_name("train", shard, 2)
        records.write_shard(path, (schema.encode(made_clip(n)) for n in numbers), "uncompressed")
    for name, config in CODECS.items():
        write_codec(folder / name, codec_of(config))
    return folder


def codec_of(config):
    """Random parameters, about as large as after a fit."""
    module, rng = template(config), np.random.default_rng(0)
    scale = lambda shape: np.prod(shape[:-1], initial=1) ** -0.5
    arrays = {
        name: np.float32(scale(leaf.shape) * rng.normal(size=leaf.shape) + name.endswith(("scale", "std")))
        for name, leaf in params.arrays_of(module).items()
    }
    return params.with_arrays(module, jax.tree.map(jax.numpy.asarray, arrays))


def encode_config(folder, codec, out, **fields):
    data = DataConfig(path=str(folder / "clips"), frames=13, batch=4)
    values = {"text": TEXT, "grid": 4, "size": SIZE, "conditioning": 3, "chunk": 2, "captions": ("scene",)}
    given = values | {"out": str(folder / out), "data": data, "codec": str(folder / codec)} | fields
    return EncodeConfig(**given)


def world_of(codec):
    pose = PoseConfig(reference="first", translation="metric")
    return WorldConfig(codec=CODECS[codec], text=TEXT, caption="scene", pose=pose)


def known_of(step):
    return np.random.default_rng(step).integers(1, 3, 4, endpoint=True).astype(np.int32)


def dataset(folder, out, codec, frames=13, intervals=None):
    texts = lambda row: clips.texts_of(world_of(codec), row["scene"], row["temporal"], intervals)
    config = DataConfig(path=str(folder / out), frames=frames, batch=4)
    return Dataset(config, reading=latents.Reading(texts, known_of))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Of the VAE, which is dear to compile, only whole crops.
@pytest.mark.parametrize(
    ("codec", "shorter", "dtype"),
    [("linear", True, None), ("conv", True, "float16"), ("vae", False, None)],
)
def test_a_crop_of_latents_is_the_encoded_crop(folder, codec, shorter, dtype):
    """At any place of the grid, for any number of known frames, and for a crop shorter than was encoded."""
    rounding = 2**-11 if dtype else 2e-5  # of the largest
    chunk = {"vae": 4}.get(codec, 2)
    summary = experiment.run(
        encode_config(folder, codec, f"out-{codec}", temporal=True, chunk=chunk, dtype=dtype)
    )
    starts = [range(0, n - 13 + 1, 4) for n in LENGTHS]
    assert summary.crops == sum(map(len, starts)) and summary.short == 1 and summary.finished
    assert str(summary).startswith("2 shards encoded, 0 were there: ")
    whole = [(made_clip(n), s) for n in range(6) for s in starts[n]]
    first = {"00000": 0, "00001": sum(map(len, starts[:3]))}  # crop of a shard

    world, text = world_of(codec), HashedNgramEncoder(TEXT)
    encode, seen = jax.jit(clips.encode), set()
    for frames, intervals in ((13, None), (9, 3))[: 1 + shorter]:
        data = dataset(folder, f"out-{codec}", codec, frames, intervals)
        assert len(data) == len(whole)
        for step in range(2):
            rows = data.rows(step, range(4))
            latents = clips.prepare_latents(world, rows, intervals)
            got = clips.unpack(latents, stride=world.codec.stride[0])
            crops = []
            for shard, index, start in (name.split(":") for name in rows["record_ids"]):
                clip, own = whole[first[shard.split("-")[1]] + int(index)]
                assert own == int(start)
                seen.add(own)
                crops.append(clip.crop(own, frames))
            prepared = clips.prepare(world, text, rows_of(crops), known_of(step), intervals=intervals)
            wanted = encode(codec_of(CODECS[codec]), text, prepared)
            for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
                assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
                np.testing.assert_allclose(ours, theirs, atol=rounding * np.abs(theirs).max(), rtol=0)
    assert len(seen) > 2, "crops of several places of the grid"


def rows_of(crops):
    """Crops of clips, scaled, as a batch."""
    pictures = {name: np.stack([getattr(c, name) for c in crops]) for name in ("frames", "intrinsics")}
    told = {
        "keys": np.stack([c.keys for c in crops]),
        "c2w": np.stack([c.c2w for c in crops]),
        "scene": [c.captions.scene(c.timestamps[-1]) for c in crops],
        "temporal": np.array([c.captions.at(c.timestamps) for c in crops]),
    }
    return resize_crops(pictures, SIZE) | told


def test_a_codec_remembers_as_long_as_its_config_says():
    """What is not a number before the grey frames reaches as many latent frames as the memory, and not one more."""
    config = VAEConfig(
        width=2,
        mults=(1, 1, 1, 1),
        blocks=1,
        time_strides=(False, True, True),
        channels=1,
        mean=(0.0,),
        std=(1.0,),
    )
    codec, known = codec_of(config), config.video_frames(2)
    video = jnp.zeros((1, config.video_frames(config.memory + 4), *config.stride[1:], 3))
    latents = jax.jit(lambda codec, video: codec.encode(video))(codec, video.at[:, :known].set(jnp.nan))
    reached = np.isnan(latents).any(axis=(0, 2, 3, 4))
    assert reached.tolist() == [True] * (2 + config.memory) + [False] * 2
    assert LinearCodecConfig().memory == ConvCodecConfig().memory == 0


@dataclasses.dataclass
class Means:
    """An encoder without a network; kills its process at its `death`-th batch."""

    death: int = -1
    batch: int = 2
    text_dtype: str = "float32"
    asked: list = dataclasses.field(default_factory=list)

    def latents(self, frames):
        self.death -= 1
        if self.death == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        mean = frames.mean(axis=(2, 3))
        return [np.stack([mean[:, i : i + 1, None, None, :]], 0)[0] for i in range(0, frames.shape[1], 4)]

    def tails(self, frames, conditioning, length):
        shape = (len(frames), conditioning, length, 1, 1, 3)
        return np.broadcast_to(frames[:, :1, 0, 0].mean((1, 2))[:, None, None, None, None, None], shape)

    def grey(self, height, width):
        return np.zeros((1, 1, 3))

    def texts(self, texts):
        self.asked += texts
        return [np.full((len(text), 2), len(text)) for text in texts]


def manifest(folder, **fields):
    values = {"clips": str(folder / "clips"), "codec": {}, "codec_sha256": "0" * 64}
    values |= {"text": {"length": 40, "dim": 2}, "captions": ("scene",), "temporal": True, "frames": 13}
    values |= {"grid": 4, "size": SIZE, "stride": 4, "conditioning": 3, "memory": 1, "dtype": "float32"}
    return latents.LatentsManifest(**values | fields)


def encode_alone(folder, out, death=-1, text_bytes=10**6, part=(0, 1), **fields):
    encoder = Means(death)
    budget = records.ErrorBudget(0)
    made = manifest(folder, **fields)
    return encode_clips(str(folder / out), made, encoder, budget, text_bytes, part), encoder


def test_a_killed_process_is_gone_on_from_and_leaves_the_same_bytes(folder):
    """SIGKILL in the middle of the second shard; also two processes that share the shards."""
    done, encoder = encode_alone(folder, "whole")
    assert done.shards == 2 and sorted(encoder.asked) == sorted(set(encoder.asked)), "no text twice"
    whole = contents(folder / "whole")
    assert {name.split("-")[0] for name in whole} == {
        "train", "train_known", "train_text", "latents.json", "dataset.json", "grey.safetensors",
    }  # fmt: skip

    killed = multiprocessing.get_context("spawn").Process(target=encode_alone, args=(folder, "killed", 5))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    left = contents(folder / "killed")
    assert any(name.endswith(".partial") for name in left) and "dataset.json" not in left
    with pytest.raises(
        ConfigError, match="^config.data.path = .*not finished; run experiments.encode again$"
    ):
        dataset(folder, "killed", "linear")
    done, _ = encode_alone(folder, "killed")
    assert (done.shards, done.there, done.finished) == (1, 1, True)
    assert contents(folder / "killed") == whole

    done = [encode_alone(folder, "shared", part=(i, 2))[0] for i in range(2)]
    assert [d.finished for d in done] == [False, True] and contents(folder / "shared") == whole
    _, forgetful = encode_alone(folder, "forgetful", text_bytes=1)
    assert len(forgetful.asked) > len(set(forgetful.asked)) and contents(folder / "forgetful") == whole

    with pytest.raises(
        ConfigError, match="^config.out = .*: its latents have grid = 4, these would have 8; choose"
    ):
        encode_alone(folder, "whole", grid=8)


def test_a_crop_costs_its_own_bytes_and_damage_is_replaced(folder, caplog):
    """Of a crop the loader reads one record, the conditioning of one number of known frames and its text."""
    encode_alone(folder, "damaged")
    path = folder / "damaged" / records.shard_name("train_known", 1, 2)
    reads, read = [], records.Readers.read
    data = dataset(folder, "damaged", "linear")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records.Readers, "read", lambda self, *a: reads.append(a) or read(self, *a))
        row = data.row(0, 0)
    kinds = [path.name.split("-")[0] for path, _ in reads]
    assert kinds == ["train", "train_known", "train_text"]
    assert row["image"][row["known"]].mean() == pytest.approx(row["image"][row["known"]].max())
    path.write_bytes(path.read_bytes()[:-40])
    made = dataset(folder, "damaged", "linear").rows(0, range(4))
    assert all(name.startswith("train-00000") for name in made["record_ids"])
    assert "replaced train-00001-of-00002:" in caplog.text


def test_encoded_texts_take_no_more_memory_than_they_may():
    cache = latents.Cache(10)
    for key in "abc":
        cache.put(key, key, 4)
    assert [cache.get(key) for key in "abc"] == [None, "b", "c"]
    cache.get("b")
    cache.put("d", "d", 4)
    assert [cache.get(key) for key in "bcd"] == ["b", None, "d"], "the one that was used last stays"


def test_what_float16_cannot_say_is_refused():
    with pytest.raises(ConfigError, match="^the encoder gave 70000: must be within 65504$"):
        latents.stored(np.float32([1.0, 70000.0]), "float16")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The clips of a run, and latents of them, one crop per clip."""
    folder = tmp_path_factory.mktemp("runs")
    micro.make_data(folder, clips=8)
    given = {"out": str(folder / "latents"), "codec": str(folder / "codec"), "conditioning": 2}
    text = micro.world_config().text
    data = DataConfig(path=str(folder / "data"), frames=micro.FRAMES, batch=4)
    experiment.run(EncodeConfig(data=data, text=text, **given))
    return folder


def run_config(runs, name, path, **fields):
    data = DataConfig(path=str(runs / path), frames=micro.FRAMES, batch=4)
    return micro.config(runs, name, curriculum=(), steps=2, **{"data": data} | fields)


def test_training_on_latents_has_the_losses_of_training_on_clips(runs):
    losses = {}
    for path in ("data", "latents"):
        config = run_config(runs, f"on-{path}", path)
        micro.train(config)
        losses[path] = micro.losses_of(config)
    assert losses["data"].keys() == losses["latents"].keys() == {1, 2}
    for step, loss in losses["data"].items():
        assert losses["latents"][step] == pytest.approx(loss, rel=1e-4)


def test_latents_that_do_not_fit_the_run_are_one_line(runs):
    other = codec_of(LinearCodecConfig(channels=8))
    write_codec(runs / "other", other)
    world = micro.world_config()
    tasks = TaskConfig(continuation=0.5, max_conditioning_frames=3)
    for fields, line in (
        (
            {"codec": str(runs / "other")},
            r"config.codec = '\S*other': \S*latents holds latents of 'another codec",
        ),
        (
            {"world": dataclasses.replace(world, caption="narrative")},
            r"config.world.caption = 'narrative': \S*latents holds latents of \('static',\); encode the clips again",
        ),
        ({"size": (16, 16)}, r"config.size = \(16, 16\): \S* holds latents of \(16, 32\)"),
        (
            {"validation": ValidationConfig(every=2)},
            r"config.validation.every = 2: must be 0: \S* holds latents",
        ),
    ):
        with pytest.raises(ConfigError, match=f"^{line}[^\n]*$"):
            train(run_config(runs, "refused", "latents", **{"tasks": tasks} | fields))
    assert not (runs / "refused").exists()
    with pytest.raises(
        ConfigError, match=r"^config.data.path = \S*: holds latents; this needs clips, as those"
    ):
        list(crops(DataConfig(path=str(runs / "latents")), "train"))
    mixed = DataConfig(
        path=str(runs / "latents"),
        frames=micro.FRAMES,
        batch=4,
        mixture=(MixtureConfig(path=str(runs / "data")),),
    )
    with pytest.raises(ConfigError, match="^config.data.mixture: clips and latents; encode all data sets"):
        train(run_config(runs, "refused", "latents", data=mixed))
