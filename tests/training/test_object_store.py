"""A run in an object store: saved, resumed, opened, damaged; against an emulator of Google's (gs://)."""

import atexit
import os
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.record_writer import GCSRecordWriter

from lingbot_jax.config import ConfigError
from lingbot_jax.data.config import DataConfig
from lingbot_jax.models import params
from lingbot_jax.models.config import DiTConfig, LinearCodecConfig
from lingbot_jax.training import owner
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.training.metrics import MetricsWriter, read_metrics
from lingbot_jax.training.run_dir import init_run_dir, load_config
from lingbot_jax.worlds import storage
from lingbot_jax.worlds.checkpoints import Checkpoints
from lingbot_jax.worlds.config import WorldConfig
from lingbot_jax.worlds.open import find, write_codec
from lingbot_jax.worlds.world import template

pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator")


def answers(port: int) -> bool:
    try:
        socket.create_connection(("localhost", port)).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def bucket():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--port={port}", "--in-memory", "--default-bucket=bucket"]
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host=localhost", *options]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    atexit.register(server.kill)
    deadline = time.monotonic() + 60
    while not answers(port):
        assert server.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, f"http://localhost:{port}")
        patch.setenv("GOOGLE_CLOUD_PROJECT", "emulated")
        patch.setattr(owner, "BEAT", 0.5)
        # Without credentials gcsfs would ask Google for the kind of the bucket, once per file.
        patch.setenv("NO_GCE_CHECK", "true")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        # Closed writers upload once more when they are collected, at the latest when the emulator is gone.
        GCSRecordWriter.__del__ = lambda self: None
        yield "gs://bucket"


def config(run: str) -> TrainConfig:
    world = WorldConfig(networks={"world": DiTConfig(dim=32, heads=2, layers=1, ffn=48)})
    data = DataConfig(path="gs://bucket/data")
    return TrainConfig(run=run, stage="world", steps=4, codec="gs://bucket/codec", world=world, data=data)


@pytest.fixture
def codec(bucket):
    """One that lies alone: a run keeps a copy of its own, in the store as well."""
    config = LinearCodecConfig(channels=2, strides=(1, 2, 2))
    arrays = {"basis": jnp.ones((12, 2)), "mean": jnp.zeros(12), "scale": jnp.ones(())}
    if not storage.located(f"{bucket}/codec/bundle.json").exists():  # the bucket outlives a test
        write_codec(f"{bucket}/codec", params.with_arrays(template(config), arrays))


def state(step: int):
    return {"step": jnp.int32(step), "params": {"world": {"kernel": jnp.arange(6.0).reshape(2, 3) + step}}}


TEMPLATE = jax.eval_shape(lambda: state(0))


def train(run: str, steps: range) -> int:
    """Where it started."""
    with (
        init_run_dir(config(run)) as made,
        Checkpoints(run, keep=2) as checkpoints,
    ):
        found = checkpoints.restore(TEMPLATE)
        start = 0 if found is None else int(found["step"])
        metrics = MetricsWriter(run, start)
        for step in steps:
            metrics.write(step, {"loss": 1 / step})
            checkpoints.save(step, state(step))
            made.check_owner()
        metrics.close()
    return start


def test_a_run_is_saved_resumed_and_opened(bucket, codec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = f"{bucket}/runs/one"
    assert train(run, range(1, 4)) == 0
    assert train(run, range(4, 5)) == 3
    assert load_config(run).run == run
    found = Checkpoints(run, read_only=True).restore(TEMPLATE)
    np.testing.assert_array_equal(found["params"]["world"]["kernel"], state(4)["params"]["world"]["kernel"])
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4]
    names = {path.name for path in storage.located(run).iterdir()}
    assert "owner.json" not in names and names >= {"config.json", "checkpoints", "metrics.jsonl"}
    assert find(run).codec == storage.located(run) / "codec"
    assert not os.listdir(tmp_path)


def test_a_flipped_bit_is_seen_there_too(bucket, codec, caplog):
    run = f"{bucket}/runs/two"
    train(run, range(1, 4))
    chunk = storage.located(run) / "checkpoints" / "3" / "arrays" / "params.world.kernel" / "0.0"
    data = bytearray(chunk.read_bytes())
    data[3] ^= 4
    chunk.write_bytes(data)
    assert train(run, range(3, 4)) == 2
    assert (
        "checkpoint 3 cannot be read, trying the one before: the values of params.world.kernel" in caplog.text
    )


def test_layers_are_written_and_read_there(bucket):
    writer = storage.Writer(f"{bucket}/layers", {"a": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)})
    for layer in range(2):
        writer.write("a", layer, np.full(3, layer + 1, jnp.bfloat16))
    writer.close()
    reader = storage.Reader(f"{bucket}/layers")
    assert [float(reader.read("a", layer)[0]) for layer in (1, 0)] == [2, 1]


def test_a_wrong_bucket_is_one_line(bucket):
    for act in (
        lambda: train("gs://no-such-bucket/run", range(1, 2)),
        lambda: load_config("gs://no-such-bucket/run"),
        lambda: storage.read("gs://no-such-bucket/x", TEMPLATE),
        lambda: storage.write("gs://no-such-bucket/x", {"a": jnp.ones(3)}),
    ):
        with pytest.raises(ConfigError, match=r"^[^\n]*gs://no-such-bucket[^\n]*$"):
            act()
