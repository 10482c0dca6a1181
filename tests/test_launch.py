"""Manifests and commands that start a run on rented TPUs: shapes of slices, words of the command, what restarts."""

import os
import pathlib
import re
import shlex
import subprocess

import pytest
from absl import flags
from ml_collections import config_flags

from experiments import common
from experiments.launch import config_words
from lingbot_jax.config import ConfigError, build
from lingbot_jax.parallel import multihost
from lingbot_jax.planning.launch import LaunchConfig, check_fit, jobset, node_pools, tpu_vm, train_arguments
from lingbot_jax.training.config import TrainConfig

ROOT = pathlib.Path(__file__).parents[1]
IMAGE = "us-docker.pkg.dev/mine/train/lingbot:1"
GIVEN = ["--config=experiments/configs/w14b.py:world", "--config.checkpoint.grace_seconds=600.5"]
GIVEN += ["--config.curriculum=()", "--config.data.batch=128", "--config.mesh.data=2"]  # for two slices
# A config file of which a phase has data sets of its own.
LONGER = """
from experiments.configs import w14b

def get_config():
    config = w14b.get_config("world")
    first, *rest = config.curriculum
    parts = ({"path": "a"}, {"path": "/mnt/b"})
    config.curriculum = (dict(first, path="longer", mixture=parts), *rest)
    return config
"""


def launch(topology="v5p:4x4x4", **fields) -> LaunchConfig:
    return LaunchConfig(**{"topology": topology, "image": IMAGE, "bucket": "gs://mine/w", **fields})


def parsed(words: list[str]) -> TrainConfig:
    """The config that experiments.train makes of these words."""
    values = flags.FlagValues()
    argv = ["train", *(word for word in words if word.startswith("--config"))]
    holder = config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=argv)
    values(argv)
    return build(TrainConfig, holder.value.to_dict())


@pytest.fixture(scope="module")
def run() -> TrainConfig:
    return parsed(GIVEN)


@pytest.fixture(scope="module")
def manifest(run) -> dict:
    return jobset(launch(slices=2, spot=True), run, GIVEN)


def test_a_jobset_has_a_job_per_slice_and_a_pod_per_host(manifest):
    (slices,) = manifest["spec"]["replicatedJobs"]
    job, pod = slices["template"]["spec"], slices["template"]["spec"]["template"]["spec"]
    assert slices["replicas"] == 2 and job["completions"] == job["parallelism"] == 64 // 4
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5p-slice"
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x4"
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["terminationGracePeriodSeconds"] == 601


def test_node_pools_are_slices():
    first, second = node_pools(launch(slices=2, spot=True, service_account="trainer"))
    assert (
        first.replace("create lingbot-0", "create lingbot-1") == second
        and "--service-account=trainer" in first
    )
    assert "--machine-type=ct5p-hightpu-4t --num-nodes=16 --tpu-topology=4x4x4" in first and "--spot" in first
    policy, pool = node_pools(launch("tpu7x:2x2x2"))
    assert "workload-policy lingbot-2x2x2" in policy and "--accelerator-topology=2x2x2" in policy
    assert "--placement-policy=lingbot-2x2x2" in pool and "--tpu-topology" not in pool


# Outside of the Job, which tests/browser compares with the schema of Kubernetes: fields of JobSet v1alpha2 by their
# types, the action and the reason as its reference has them.
FIELDS = {
    "": {"apiVersion": str, "kind": str, "metadata": dict, "spec": dict},
    "metadata": {"name": str, "namespace": str, "annotations": dict},
    "spec": {"failurePolicy": dict, "replicatedJobs": list},
    "spec.failurePolicy": {"maxRestarts": int, "restartStrategy": str, "rules": list},
    "spec.failurePolicy.rules.0": {"name": str, "action": str, "onJobFailureReasons": list},
    "spec.replicatedJobs.0": {"name": str, "replicas": int, "template": dict},
    "spec.replicatedJobs.0.template": {"spec": dict},
}


def test_a_jobset_has_the_fields_of_its_api(manifest):
    for path, kinds in FIELDS.items():
        found = manifest
        for part in filter(None, path.split(".")):
            found = found[int(part) if part.isdecimal() else part]
        assert {name: type(value) for name, value in found.items()} == kinds, path
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = manifest["spec"]["failurePolicy"]
    assert policy["restartStrategy"] in ("Recreate", "BlockingRecreate")
    assert policy["rules"][0]["action"] in ("FailJobSet", "RestartJobSet")


def fate(manifest: dict, code: int) -> str:
    """What becomes of the JobSet when a container ends: the rules of Kubernetes and of JobSet, read by hand."""
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    reason = "BackoffLimitExceeded" if job["backoffLimit"] == 0 else None
    for rule in job["podFailurePolicy"]["rules"]:
        if (code in rule["onExitCodes"]["values"]) == (rule["onExitCodes"]["operator"] == "In"):
            reason = {"FailJob": "PodFailurePolicy", "Ignore": None, "Count": reason}[rule["action"]]
            break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        if reason in rule["onJobFailureReasons"]:
            return rule["action"]
    return "RestartJobSet"


def test_all_but_a_users_mistake_restarts(manifest):
    again = (multihost.PREEMPTED, multihost.LOST, multihost.STALLED, 134, 137, 1)
    assert {code: fate(manifest, code) for code in again} == dict.fromkeys(again, "RestartJobSet")
    assert fate(manifest, 2) == "FailJobSet"


def test_the_words_of_a_pod_make_the_config_with_its_paths_in_the_bucket(tmp_path):
    (tmp_path / "longer.py").write_text(LONGER)
    given = [f"--config={tmp_path}/longer.py", "--config.init=high=bundles/a,low=gs://other/b#high"]
    run = parsed(given)
    made = parsed([given[0], *train_arguments(launch(), run, given[1:])])
    assert made.run == f"gs://mine/w/{run.run}" and made.codec == f"gs://mine/w/{run.codec}"
    assert made.data.path == f"gs://mine/w/{run.data.path}"
    assert made.init == "high=gs://mine/w/bundles/a,low=gs://other/b#high"
    first, *rest = made.curriculum
    paths = [first.path, *(part.path for part in first.mixture)]
    assert paths == ["gs://mine/w/longer", "gs://mine/w/a", "/mnt/b"]
    assert rest == list(run.curriculum[1:]) and made.world == run.world


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:4x4x4", "v6e:2x4", "tpu7x:2x2x2"])
def test_hosts_are_those_that_libtpu_counts(topology):
    pytest.importorskip("libtpu", reason="no libtpu")
    from lingbot_jax.planning.programs import topology_devices

    devices, made = topology_devices(topology), launch(topology)
    assert (made.hosts, made.devices) == (len({d.process_index for d in devices}), len(devices))


def test_tpu_vms_of_several_slices(run):
    create, _, start, _ = tpu_vm(launch(kind="tpu_vm", zone="us-east5-a", slices=2), run, GIVEN)
    assert "--type=v5p --topology=4x4x4" in create and "--node-count=2 --node-prefix=lingbot" in create
    assert {"--node=all", "--worker=all"} <= set(shlex.split(start))
    create, *_ = tpu_vm(launch("v6e:8x8", kind="tpu_vm", zone="us-east5-a"), parsed(GIVEN[:1]), GIVEN[:1])
    assert "--accelerator-type=v6e-64" in create and "--node-id=lingbot" in create


@pytest.mark.parametrize("codes, end, starts", [((143, 75, 0), 0, 3), ((143, 2, 0), 2, 2)])
def test_a_tpu_vm_starts_again_but_not_after_a_mistake(run, tmp_path, codes, end, starts):
    """The loop as a shell runs it, with a docker that ends with these codes."""
    *_, start, _ = tpu_vm(launch(kind="tpu_vm", zone="us-east5-a"), run, GIVEN)
    (remote,) = [w.removeprefix("--command=") for w in shlex.split(start) if w.startswith("--command=")]
    nohup, bash, c, loop, *_ = shlex.split(remote)
    assert (nohup, bash, c) == ("nohup", "bash", "-c") and remote.endswith(">train.log 2>&1 </dev/null &")
    sudo = '[ "$1" = docker ] || exit 0; echo "$@" >>said; n=$(wc -l <said); set -- ' + " ".join(
        map(str, codes)
    )
    for name, script in {"sudo": f"{sudo}; shift $((n - 1)); exit $1", "sleep": "exit 0"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", loop], cwd=tmp_path, env={"PATH": path}, timeout=60)
    said = (tmp_path / "said").read_text().splitlines()
    assert (done.returncode, len(said)) == (end, starts) and len(set(said)) == 1
    assert (
        f"{IMAGE} experiments.train --distributed {GIVEN[0]}" in said[0] and "--stop-timeout=601" in said[0]
    )


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"topology": "v5p:4x4"}, "topology = 'v5p:4x4': v5p has shapes NxNxN"),
        ({"topology": "v6e:3x4"}, "topology = 'v6e:3x4': hosts are 2x2 chips"),
        ({"topology": "v9:4x4"}, "generation 'v9' is not one of"),
        ({"topology": "v5p:2x2x1", "slices": 2}, "slices = 2: a slice of v5p:2x2x1 is one host"),
        ({"topology": "tpu7x:4x4x4", "kind": "tpu_vm"}, "topology = 'tpu7x:4x4x4': only GKE has it"),
        ({"kind": "tpu_vm"}, "zone = None: give the zone"),
        ({"bucket": "mine"}, "bucket = 'mine': must begin with gs://"),
        ({"name": "Lingbot"}, "name = 'Lingbot'"),
    ],
)
def test_wrong_fields_are_named(fields, said):
    with pytest.raises(ConfigError, match=said):
        launch(**fields)


@pytest.mark.parametrize(
    "topology, slices, said",
    [
        ("v5p:4x4x4", 1, None),
        ("v5p:4x4x4", 2, "config.curriculum[0].mesh.data = 1: must be a multiple of 2 slices"),
        (
            "v5p:4x4x8",
            1,
            "config.curriculum[0].batch = 64: must be a multiple of data x fsdp = 128 on 128 devices",
        ),
        ("tpu7x:4x4x4", 1, "config.curriculum[0].batch = 64: must be a multiple of data x fsdp = 128 on 128"),
        ("v6e:2x2", 1, "config.mesh = (1, -1, 8): product 8 must divide the 4 devices"),
    ],
)
def test_what_does_not_fit_is_found_before_renting(topology, slices, said):
    shipped = parsed(GIVEN[:1])
    if said is None:
        check_fit(launch(topology, slices=slices), shipped)
        return
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_fit(launch(topology, slices=slices), shipped)


def test_what_a_pod_would_lose_or_lack_is_refused(run):
    with pytest.raises(ConfigError, match="config.run = .*: a pod's disk goes with it"):
        train_arguments(launch(bucket=None), run, GIVEN)
    with pytest.raises(ConfigError, match="config = '/home/me/x.py': must be a file of this repository"):
        train_arguments(launch(), run, ["--config=/home/me/x.py"])


def test_words_of_the_config_are_found_whole():
    assert config_words(["--topology=v5p:2x2x2", "-config=a.py", "--config.x=1"]) == [
        "--config=a.py",
        "--config.x=1",
    ]
    with pytest.raises(Exception, match="--config.x: write it as --config.x=VALUE, one word"):
        config_words(["--config.x", "1"])


def test_the_commands_of_the_docs_are_accepted():
    text = (ROOT / "docs" / "pods.md").read_text().replace("\\\n", " ")
    named = dict(re.findall(r"(\b[A-Z]+)=(\S+)", text.partition("## 2a")[0]))
    commands = [line for line in text.splitlines() if line.startswith("python -m experiments.launch")]
    assert len(commands) == 2
    for command in commands:
        for _ in range(2):  # names whose values have names
            command = re.sub(r"\$([A-Z]+)", lambda m: named[m[1]], command)
        words = shlex.split(command.partition(" > ")[0])[3:]
        values = flags.FlagValues()
        common.define_fields(LaunchConfig, values)
        values(["launch", *(word for word in words if not word.startswith("--config"))])
        made, given = common.read_fields(LaunchConfig, values), config_words(words)
        render = jobset if made.kind == "jobset" else tpu_vm
        assert "us-east5-docker.pkg.dev/mine/train/lingbot:1" in str(render(made, parsed(given), given))
