"""Training on rented TPUs: the manifest of a Kubernetes JobSet, or the commands of TPU VMs (docs/pods.md).

a slice          -> one replicated Job, bound to one node pool; its hosts are the Job's completions
a host, 4 chips  -> one pod, one process of the run; JAX finds its peers by what GKE and TPU VMs tell it
exit code 2      -> a mistake of the user: the JobSet fails
any other, or a node that is gone -> all Jobs are made again and the same command resumes the run
"""

import dataclasses
import math
import posixpath
import re
import shlex
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from lingbot_jax.config import ConfigError, Path, config, flat, require
from lingbot_jax.files import is_remote
from lingbot_jax.parallel.chips import chip
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.training.run_dir import with_paths

HOST_CHIPS = 4  # of the machine types below, and of every slice of several hosts
MISTAKE = 2  # exit code of experiments after a user's mistake
NAME = r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$"  # short enough for the names of pods that JobSet makes of it


@dataclasses.dataclass(frozen=True)
class Offer:
    """What Google calls a TPU generation.

    Attributes:
      label: the node label cloud.google.com/gke-tpu-accelerator. machine: type of a GKE node of 4 chips.
      sizes: dimensions of a topology. devices: of JAX, in a chip.
      vm: type of a TPU VM, runtime: its software; None: GKE alone has it.
    """

    label: str
    machine: str
    sizes: int
    devices: int
    vm: str | None
    runtime: str | None


OFFERS = {
    "v5e": Offer("tpu-v5-lite-podslice", "ct5lp-hightpu-4t", 2, 1, "v5litepod", "v2-alpha-tpuv5-lite"),
    "v5p": Offer("tpu-v5p-slice", "ct5p-hightpu-4t", 3, 1, "v5p", "v2-alpha-tpuv5"),
    "v6e": Offer("tpu-v6e-slice", "ct6e-standard-4t", 2, 1, "v6e", "v2-alpha-tpuv6e"),
    "tpu7x": Offer("tpu7x", "tpu7x-standard-4t", 3, 2, None, None),
}


@config
class LaunchConfig:
    """Where a training run is started, and how it is restarted."""

    topology: Annotated[str, Field(max_length=64)] = Field(
        description="TPU generation and shape of a slice, as experiments.plan has it, e.g. v5p:4x4x4 or v6e:8x8"
    )
    image: Annotated[str, Field(pattern=r"^[0-9A-Za-z_./:@-]+$", max_length=512)] = Field(
        description="container image of the Dockerfile, e.g. REGION-docker.pkg.dev/PROJECT/REPOSITORY/lingbot:TAG"
    )
    kind: Literal["jobset", "tpu_vm"] = Field(
        "jobset", description="a manifest for GKE, or the commands of TPU VMs"
    )
    slices: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="of that shape, joined along `data`")
    name: Annotated[str, Field(pattern=NAME)] = Field("lingbot", description="of the JobSet, or of the VMs")
    namespace: Annotated[str, Field(pattern=NAME)] = Field("default", description="jobset: of Kubernetes")
    service_account: Annotated[str, Field(pattern=r"^[0-9A-Za-z_.@-]+$", max_length=253)] | None = Field(
        None,
        description="Google service account of the nodes, that may read and write the bucket; None: the default",
    )
    bucket: Path | None = Field(
        None,
        description="gs://BUCKET or gs://BUCKET/FOLDER that the config's relative paths are in, and compiled programs",
    )
    max_restarts: Annotated[int, Field(ge=0, le=10**6)] = Field(
        100, description="jobset: after which it fails; preemptions count too"
    )
    spot: bool = Field(False, description="spot capacity: cheaper, and preempted at any time")
    zone: Annotated[str, Field(pattern=r"^[a-z]+(-[a-z0-9]+)+$")] | None = Field(
        None, description="tpu_vm: of the TPUs, e.g. us-east5-a"
    )

    def __post_init__(self):
        dimensions(self.topology)
        alone = self.slices == 1 or self.hosts > 1
        require(
            alone, "slices", self.slices, f"a slice of {self.topology} is one host: give a larger topology"
        )
        bucket = self.bucket
        require(bucket is None or bucket.startswith("gs://"), "bucket", bucket, "must begin with gs://")
        if self.kind == "tpu_vm":
            require(self.offer.vm is not None, "topology", self.topology, "only GKE has it: --kind=jobset")
            require(self.zone is not None, "zone", None, "give the zone of the TPUs, e.g. us-east5-a")

    @property
    def offer(self) -> Offer:
        return OFFERS[self.topology.partition(":")[0]]

    @property
    def hosts(self) -> int:
        """Of one slice."""
        return math.prod(dimensions(self.topology)) // HOST_CHIPS

    @property
    def devices(self) -> int:
        """Of all slices, as JAX counts them."""
        return self.slices * self.hosts * HOST_CHIPS * self.offer.devices

    @property
    def shape(self) -> str:
        return self.topology.partition(":")[2]


def dimensions(topology: str) -> tuple[int, ...]:
    """The shape of a topology name in chips. Raises ConfigError unless whole hosts, 2x2 or 2x2x1 chips, fill it."""
    chip(topology)
    generation, _, shape = topology.partition(":")
    sizes = OFFERS[generation].sizes
    form = "x".join("N" * sizes)
    ok = re.fullmatch(r"\d{1,3}(x\d{1,3})*", shape) and shape.count("x") == sizes - 1
    require(bool(ok), "topology", topology, f"{generation} has shapes {form}")
    found = tuple(int(n) for n in shape.split("x"))
    whole = min(found) > 0 and found[0] % 2 == 0 and found[1] % 2 == 0
    require(whole, "topology", topology, "hosts are 2x2 chips: the first two numbers must be even")
    return found


def check_fit(launch: LaunchConfig, run: TrainConfig) -> None:
    """Raises ConfigError, as every process would at its start: a phase's mesh or batch does not fit the devices."""
    for index, phase in enumerate(run.phases()):
        where = f"config.curriculum[{index}]." if run.curriculum else "config."
        mesh = phase.mesh.resolve(launch.devices)
        fits = f"must be a multiple of {launch.slices} slices"
        require(mesh.data % launch.slices == 0, f"{where}mesh.data", mesh.data, fits)
        rows, batch = mesh.data * mesh.fsdp, phase.data.batch
        fits = f"must be a multiple of data x fsdp = {rows} on {launch.devices} devices"
        require(batch % rows == 0, f"{where}batch" if run.curriculum else "config.data.batch", batch, fits)


def train_arguments(launch: LaunchConfig, run: TrainConfig, given: Sequence[str]) -> list[str]:
    """What `experiments.train` is called with: the words `--config...` as given, and paths that are in the bucket.

    Raises:
      ConfigError: the config file is outside the image, the config does not fit the devices, or the run would be on
        the disk of a machine that is lent.
    """
    check_fit(launch, run)
    file = next((word for word in given if word.startswith("--config=")), "--config=")[len("--config=") :]
    within = not file.startswith("/") and ".." not in file
    require(within, "config", file, "must be a file of this repository, as the image has it: a relative path")
    words = ["experiments.train", "--distributed", *given]
    if launch.bucket is not None:
        inside = lambda p: p if is_remote(p) or p.startswith("/") else posixpath.join(launch.bucket, p)
        moved = with_paths(run, inside)
        before = dict(flat(dataclasses.asdict(run)))
        after = flat(dataclasses.asdict(moved))
        words += [f"--config.{name}={value}" for name, value in after if value != before[name]]
        words.append(f"--compilation_cache={posixpath.join(launch.bucket, 'compiled')}")
        run = moved
    if not is_remote(run.run):
        raise ConfigError(
            f"config.run = {run.run!r}: a pod's disk goes with it; give --bucket=gs://... or a run in gs://"
        )
    return words


def jobset(launch: LaunchConfig, run: TrainConfig, given: Sequence[str]) -> dict[str, Any]:
    """The JobSet (jobset.x-k8s.io/v1alpha2, since JobSet 0.7) of a run, as YAML and JSON have it.

    Args:
      given: the words `--config...` that `run` was made from.
    """
    container = {
        "name": "train",
        "image": launch.image,
        "args": train_arguments(launch, run, given),  # the image's entry point is tini -- python -m
        # The device files of the TPUs belong to root, and the buffers that they share with a host are locked memory.
        "securityContext": {"runAsUser": 0, "capabilities": {"add": ["SYS_RESOURCE"]}},
        "resources": {"limits": {"google.com/tpu": HOST_CHIPS}},
    }
    if run.wandb.project is not None:
        secret = {"secretKeyRef": {"name": "wandb", "key": "api-key", "optional": True}}
        container["env"] = [{"name": "WANDB_API_KEY", "valueFrom": secret}]
    selector = {
        "cloud.google.com/gke-tpu-accelerator": launch.offer.label,
        "cloud.google.com/gke-tpu-topology": launch.shape,
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",  # of a container alone: its peers would wait for it in vain
        "terminationGracePeriodSeconds": math.ceil(run.checkpoint.grace_seconds),
        "hostNetwork": True,  # between slices all goes through it; and the pods act as their nodes' account
        "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": selector,
        "containers": [container],
    }
    if launch.spot:
        spot = "cloud.google.com/gke-spot"
        selector[spot] = "true"
        pod["tolerations"] = [{"key": spot, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
    codes = {"containerName": "train", "operator": "In", "values": [MISTAKE]}
    job = {
        "parallelism": launch.hosts,
        "completions": launch.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # a pod that fails fails its Job, and JobSet restarts them all
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": codes}]},
        "template": {"spec": pod},
    }
    mistake = {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": launch.name,
            "namespace": launch.namespace,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": launch.max_restarts,
                "restartStrategy": "BlockingRecreate",  # nothing starts before the last old process is gone
                "rules": [mistake],
            },
            "replicatedJobs": [{"name": "slice", "replicas": launch.slices, "template": {"spec": job}}],
        },
    }


def node_pools(launch: LaunchConfig) -> list[str]:
    """The commands that add the JobSet's node pools to a cluster: one for each slice."""
    policy, commands = f"{launch.name}-{launch.shape}", []
    words = ["--cluster=CLUSTER", "--location=REGION", "--node-locations=ZONE", "--scopes=cloud-platform"]
    words += [f"--machine-type={launch.offer.machine}", f"--num-nodes={launch.hosts}"]
    if launch.topology.startswith("tpu7x") and launch.hosts > 1:  # the policy has the topology
        create = ["gcloud", "compute", "resource-policies", "create", "workload-policy", policy]
        shape = f"--accelerator-topology={launch.shape}"
        commands.append(shlex.join([*create, "--type=HIGH_THROUGHPUT", shape, "--region=REGION"]))
        words.append(f"--placement-policy={policy}")
    else:
        words.append(f"--tpu-topology={launch.shape}")
    if launch.service_account is not None:
        words.append(f"--service-account={launch.service_account}")
    words += ["--spot"] if launch.spot else []
    create = ["gcloud", "container", "node-pools", "create"]
    return commands + [shlex.join([*create, f"{launch.name}-{i}", *words]) for i in range(launch.slices)]


def tpu_vm(launch: LaunchConfig, run: TrainConfig, given: Sequence[str]) -> list[str]:
    """The commands that ask for TPU VMs, start the run on all of them, and give them back.

    Args:
      given: the words `--config...` that `run` was made from.
    """
    offer, queued = launch.offer, ["gcloud", "compute", "tpus", "queued-resources"]
    at = [launch.name, f"--zone={launch.zone}"]
    if offer.sizes == 3:  # several shapes have as many chips
        create = [f"--type={offer.vm}", f"--topology={launch.shape}"]
    else:
        create = [f"--accelerator-type={offer.vm}-{math.prod(dimensions(launch.topology))}"]
    create.append(f"--runtime-version={offer.runtime}")
    many = [f"--node-count={launch.slices}", f"--node-prefix={launch.name}"]
    create += [f"--node-id={launch.name}"] if launch.slices == 1 else many
    if launch.service_account is not None:
        create.append(f"--service-account={launch.service_account}")
    create += ["--spot"] if launch.spot else []
    docker = ["sudo", "docker", "run", "--rm", "--name=train", "--privileged", "--network=host", "--user=0"]
    docker.append(f"--stop-timeout={math.ceil(run.checkpoint.grace_seconds)}")
    start = shlex.join([*docker, launch.image, *train_arguments(launch, run, given)])
    registry = launch.image.partition("/")[0]
    login = f"sudo gcloud auth configure-docker {registry} --quiet; " if registry.endswith(".pkg.dev") else ""
    loop = f"{login}until {start}; do code=$?; [ $code = {MISTAKE} ] && exit {MISTAKE}; sleep 10; done"
    detached = f"nohup bash -c {shlex.quote(loop)} >train.log 2>&1 </dev/null &"  # it outlives the connection
    everywhere = ["--node=all", "--worker=all", f"--command={detached}"]
    return [
        shlex.join([*queued, "create", *at, *create]),
        shlex.join([*queued, "describe", *at]),
        shlex.join([*queued, "ssh", *at, *everywhere]),
        shlex.join([*queued, "delete", *at, "--force"]),
    ]
