"""Metrics are means over their interval, and their files are never needed to resume."""

import importlib.machinery
import io
import json
import os
import sys
import types

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from lingbot_jax.config import ConfigError
from lingbot_jax.training.metrics import Means, MetricsWriter, read_metrics
from lingbot_jax.training.wandb_run import WandbConfig, open_wandb


def write(run, *steps, restored=0):
    writer = MetricsWriter(run, restored)
    for step in steps:
        writer.write(step, {"loss": step / 2})
    writer.close()


def steps(run):
    return [line["step"] for line in read_metrics(run)]


def test_lines_after_the_restored_step_are_made_again(tmp_path):
    write(tmp_path, 1, 2, 3)
    write(tmp_path, 3, 4, restored=2)
    assert steps(tmp_path) == [1, 2, 3, 4]


DAMAGE = {
    "garbage": b"\x00\xff{[\n",
    "other types": b'3\n[]\n{"step": "x"}\n{"loss": 1}\n',
    "deep": b"[" * 100000 + b"\n",
    "fifo": None,
    "folder": None,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_lines_are_moved_aside_with_a_warning(tmp_path, kind, caplog):
    write(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    if DAMAGE[kind] is None:
        path.unlink()
        os.mkfifo(path) if kind == "fifo" else path.mkdir()
    else:
        path.write_bytes(path.read_bytes() + DAMAGE[kind])
    write(tmp_path, 3, restored=2)
    assert steps(tmp_path) == ([3] if DAMAGE[kind] is None else [1, 2, 3])
    assert (tmp_path / "metrics.jsonl.damaged").exists()
    assert "the run goes on" in caplog.text


def test_a_line_cut_off_by_a_kill_is_no_damage(tmp_path, caplog):
    write(tmp_path, 1, 2)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    write(tmp_path, 3, restored=2)
    assert steps(tmp_path) == [1, 2, 3] and not caplog.text


def test_means_are_of_sums_and_counts():
    means = Means()
    means.add({"loss": (6.0, 2), "loss_noisy": (0.0, 0)})
    means.add({"loss": (1.0, 1), "loss_noisy": (0.0, 0)})
    assert means.take() == {"loss": 7 / 3}
    assert means.take() == {}


def test_videos_are_moving_pictures_in_tensorboard(tmp_path):
    frames = np.zeros((3, 4, 6, 3), np.uint8)
    frames[1] = 255
    writer = MetricsWriter(tmp_path, 0)
    writer.videos(5, {"sample": frames})
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    data, found = events.read_bytes(), []
    while data:  # TFRecord: length, its checksum, the record, its checksum
        size = int.from_bytes(data[:8], "little")
        found.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    (image,) = [v.image for event in found for v in event.summary.value if v.tag == "sample"]
    with Image.open(io.BytesIO(image.encoded_image_string)) as gif:
        assert (gif.n_frames, gif.size) == (3, (6, 4)) == (3, (image.width, image.height))


def test_lines_are_json_by_step(tmp_path):
    write(tmp_path, 1)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}


class FakeWandb(types.ModuleType):
    """The part of the package that is used; `init` gives itself as the run."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.starts, self.logged, self.axis, self.refusal = [], [], {}, None

    def init(self, **given):
        self.starts.append(given)
        if self.refusal:
            raise self.Error(self.refusal)
        return self

    def define_metric(self, name, step_metric):
        self.axis[name] = step_metric

    def Settings(self, **given):
        return given

    def Video(self, data, format):
        return format, data.getvalue()

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.logged.append("finished")


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_goes_on_with_the_run_of_the_run_directory(tmp_path, wandb, caplog):
    asked = WandbConfig(project="worlds", entity="us")
    for restored in (0, 2):
        writer = MetricsWriter(tmp_path, restored, open_wandb(tmp_path, asked, {"steps": 4}))
        writer.write(restored + 1, {"loss": 0.5})
        writer.videos(restored + 1, {"sample": np.zeros((2, 4, 6, 3), np.uint8)})
        writer.close()
    first, again = wandb.starts
    assert first == again and first["id"] and first["resume"] == "allow"
    assert (first["project"], first["entity"], first["config"]) == ("worlds", "us", {"steps": 4})
    assert wandb.axis == {"*": "step"} and wandb.logged[::3] == [{"step": s, "loss": 0.5} for s in (1, 3)]
    assert wandb.logged[1]["sample"][1].startswith(b"GIF") and wandb.logged[2] == "finished"
    other = tmp_path / "other"
    other.mkdir()
    open_wandb(other, asked, {})
    assert wandb.starts[2]["id"] != first["id"] and not caplog.text
    (other / "wandb.json").write_text("{")
    open_wandb(other, asked, {})
    assert wandb.starts[3]["id"] != wandb.starts[2]["id"] and "wandb.json is damaged" in caplog.text


def test_wandb_that_cannot_be_had_is_one_line(tmp_path, wandb, monkeypatch):
    assert open_wandb(tmp_path, WandbConfig(), {}) is None and not list(tmp_path.iterdir())
    wandb.refusal = "api_key not configured\n(no-tty)"
    with pytest.raises(ConfigError, match="project = 'a': api_key not configured .*; give WANDB_API_KEY, or"):
        open_wandb(tmp_path, WandbConfig(project="a"), {})
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(
        ConfigError, match=r"project = 'a': wandb is not installed: pip install -e '.\[wandb\]'"
    ):
        WandbConfig(project="a").check()
