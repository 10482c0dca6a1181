"""Prints what starts a training run on rented TPUs: the manifest of a JobSet for GKE, or the commands of TPU VMs.

    python -m experiments.launch --config=experiments/configs/w14b.py:world --topology=v5p:4x4x4 \\
        --image=us-docker.pkg.dev/mine/train/lingbot:1 --bucket=gs://mine > jobset.yaml
    kubectl apply -f jobset.yaml
    python -m experiments.launch ... --kind=tpu_vm --zone=us-east5-a

--config and --config.FIELD=VALUE are those of experiments.train, which is what every host runs; each is one word.
Nothing is started here. Plan first (experiments.plan); docs/pods.md: from an empty project to a resumed run.
"""

import sys

import yaml

from experiments import common
from lingbot_jax.planning.launch import LaunchConfig, jobset, node_pools, tpu_vm
from lingbot_jax.training.config import TrainConfig

CONFIG = common.define_config(TrainConfig)


def config_words(argv: list[str]) -> list[str]:
    """The words of a command line that make the config. Raises UserError for one whose value stands apart."""
    found = [f"--{word.lstrip('-')}" for word in argv if word.lstrip("-").startswith(("config=", "config."))]
    apart = [word for word in argv if word.lstrip("-") == "config"] + [w for w in found if "=" not in w]
    if apart:
        raise common.UserError(f"{apart[0]}: write it as {apart[0]}=VALUE, one word")
    return found


def main() -> None:
    run = common.load(CONFIG, TrainConfig)
    launch = common.read_fields(LaunchConfig)
    words = config_words(sys.argv[1:])
    if launch.kind == "tpu_vm":
        print("\n".join(tpu_vm(launch, run, words)))
        return
    made = jobset(launch, run, words)
    pools = "".join(f"#   {line}\n" for line in node_pools(launch))
    print(
        f"# Its node pools, where the cluster has none yet:\n{pools}{yaml.safe_dump(made, sort_keys=False)}",
        end="",
    )


if __name__ == "__main__":
    common.define_fields(LaunchConfig)
    common.run(main)
