"""The examples of docs/serving.md, read by the programs that they are for."""

import os
import pathlib
import shutil
import subprocess

import pytest

from experiments.configs import w14b
from lingbot_jax.config import build
from lingbot_jax.planning.launch import LaunchConfig, jobset
from lingbot_jax.training.config import TrainConfig

validate = pytest.importorskip("kubernetes_validate")
yaml = pytest.importorskip("yaml")

pytestmark = pytest.mark.browser
EXAMPLES = pathlib.Path(__file__).parents[2] / "docs" / "serving"
NGINX = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")


def test_nginx_accepts_its_example(tmp_path):
    command = [NGINX, "-t", "-c", EXAMPLES / "nginx.conf", "-p", tmp_path, "-e", "stderr"]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0 and "test is successful" in checked.stderr, checked.stderr


def test_kubernetes_accepts_its_example():
    found = list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()))
    kinds = ["Deployment", "Service", "Ingress", "HorizontalPodAutoscaler", "PodDisruptionBudget"]
    assert [part["kind"] for part in found] == kinds
    for part in found:
        validate.validate(part, "1.34", strict=True)


def test_a_wrong_example_is_not_accepted():
    (deployment, *_) = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    deployment["spec"]["replica"] = 3
    with pytest.raises(validate.ValidationError):
        validate.validate(deployment, "1.34", strict=True)


def test_kubernetes_accepts_the_job_of_a_launch():
    """The Job inside a JobSet; there is no schema of JobSet itself, whose fields tests/test_launch.py compares."""
    run = build(TrainConfig, w14b.get_config("world").to_dict())
    launch = LaunchConfig("v5p:4x4x4", "lingbot:1", bucket="gs://b", spot=True)
    (slices,) = jobset(launch, run, ["--config=experiments/configs/w14b.py:world"])["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **slices["template"]}
    validate.validate(job, "1.34", strict=True)
    job["spec"]["podFailurePolicy"]["rules"][0]["onExitCode"] = {}
    with pytest.raises(validate.ValidationError):
        validate.validate(job, "1.34", strict=True)
