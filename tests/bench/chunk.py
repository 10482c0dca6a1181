"""How long a chunk of play takes at the published sizes, beside the goals (docs/serving.md).

Each row compiles the real programs of a session for a topology, minutes each. Every row is a line of JSON.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator

from experiments.configs import w1_3b, w14b
from lingbot_jax.config import build
from lingbot_jax.planning.latency import plan_serving
from lingbot_jax.planning.programs import Where
from lingbot_jax.planning.serving import serving
from lingbot_jax.training.config import TrainConfig

# (config, topology, height, width, weights) and the seconds that a chunk may take, as scheduled.
CASES = {
    (w14b, "v6e:2x4", 480, 832, "split"): 0.300,
    (w14b, "tpu7x:2x2x1", 480, 832, "whole"): 0.230,
    (w14b, "tpu7x:2x2x1", 720, 1280, "whole"): 0.750,
    (w1_3b, "v6e:1x1", 480, 832, "whole"): 0.533,
    (w1_3b, "tpu7x:1x1x1", 480, 832, "whole"): 0.267,
}


def run() -> Iterator[str]:
    for i, ((config, topology, height, width, weights), goal) in enumerate(CASES.items()):
        print(f"{i + 1}/{len(CASES)}: {topology}, {height} x {width}", file=sys.stderr, flush=True)
        world = build(TrainConfig, config.get_config("fast").to_dict())
        made = serving(world, Where(topology, height=height, width=width), weights)
        plan = plan_serving(made, "chunk")
        yield json.dumps(dataclasses.asdict(plan) | {"goal": goal})
        if plan.chunk_seconds is not None:
            assert plan.chunk_seconds_hidden <= plan.chunk_seconds <= plan.chunk_seconds_serial, topology
            assert plan.chunk_seconds >= max(plan.terms.values()), topology
