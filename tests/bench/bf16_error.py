"""What bfloat16 costs, layer by layer: `python -m tests.bench bf16_error [--goldens=FOLDER]`.

The reference is `tests/models/numpy_dit.py` in float64; weights are rounded to bfloat16 before, so that only arithmetic
differs. Columns, as root mean square of the error over that of the values:

    published    the reference rounded where the published code rounds under CUDA autocast
    bfloat16     ours: dtype bfloat16, residual_dtype float32 (the defaults)
    unfused      the same, with the roundings that the compiler drops inside what it fuses
    stream       ours: residual_dtype bfloat16 as well
    float32      ours: dtype float32

The last row is the gradient of a weighted sum of the velocity by all parameters, against that of float32.

Prints a table per network and one JSON line. Without --goldens the network is a random one.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

from lingbot_jax.models import params
from lingbot_jax.models.dit import Condition, WorldDiT
from tests.golden import Case, case_names
from tests.goldens.networks_dit import load_dit, pad_text, taps
from tests.models import numpy_dit, worlds


def evaluate(model: WorldDiT, latents, timestep, condition: Condition, weight):
    """What the blocks and the network give, and the gradient of a weighted sum of the velocity."""

    def loss(arrays):
        return jnp.sum(params.with_arrays(model, arrays)(latents, timestep, condition) * weight)

    found = taps(model, latents, timestep, condition)
    return found, jax.grad(loss)(params.arrays_of(model))


fused = jax.jit(evaluate)
unfused = jax.jit(evaluate, compiler_options={"xla_allow_excess_precision": False})
OURS = {
    "bfloat16": (fused, "bfloat16", "float32"),
    "unfused": (unfused, "bfloat16", "float32"),
    "stream": (fused, "bfloat16", "bfloat16"),
    "float32": (fused, "float32", "float32"),
}


def of_golden(case: Case) -> numpy_dit.Sample:
    text = np.asarray(pad_text(case["context"], case.config["text_len"])[0])
    return numpy_dit.Sample(
        case.config, case.weights(), case["x"], case["t_tokens"].reshape(-1), case["y"], text, case["cam"][0]
    )


def samples(folder: pathlib.Path | None) -> Iterator[tuple[str, numpy_dit.Sample]]:
    """The networks with a camera among the golden cases of a folder."""
    if folder is None:
        yield "random", worlds.sample_of(worlds.make(layers=4, spatial_stride=8))
        return
    for name in case_names(folder):
        case = Case(folder, name)
        if all(part in case for part in ("x", "y", "cam", "context", "t_tokens")):
            yield name, of_golden(case)


def errors(sample: numpy_dit.Sample) -> dict[str, dict[str, float]]:
    """Relative error by column and layer."""
    config, weights, *inputs = sample
    weights = {name: numpy_dit.to_bfloat16(w).astype(np.float32) for name, w in weights.items()}
    expected = numpy_dit.Network(config, weights)(*inputs)
    found = {"published": numpy_dit.Network(config, weights, rounded=True)(*inputs)}
    model = load_dit(config, weights)
    last = lambda x: jnp.asarray(np.moveaxis(x, 0, -1)[None])
    mask = model.config.mask_channels
    condition = Condition(
        jnp.asarray(sample.text)[None],
        last(sample.camera),
        last(sample.known[:mask]),
        last(sample.known[mask:]),
    )
    levels = jnp.asarray(sample.timestep, jnp.float32).reshape(1, sample.latents.shape[1], -1)
    weight, gradients = (
        jax.random.normal(jax.random.key(0), (1, *sample.latents.shape[1:], len(sample.latents))),
        {},
    )
    for name, (run, dtype, stream) in OURS.items():
        change = dataclasses.replace(model.config, dtype=dtype, residual_dtype=stream)
        inputs = last(sample.latents), levels, condition, weight
        ours, slopes = run(worlds.with_config(model, change), *inputs)
        ours["out"] = jnp.moveaxis(ours["out"][0], -1, 0)
        found[name] = {n: np.asarray(ours[n], np.float64).reshape(expected[n].shape) for n in expected}
        gradients[name] = np.concatenate([np.asarray(g, np.float64).ravel() for g in slopes.values()])
    table = {name: {n: numpy_dit.relative(x[n], expected[n]) for n in expected} for name, x in found.items()}
    for name in set(OURS) - {"float32"}:
        table[name]["gradient"] = numpy_dit.relative(gradients[name], gradients["float32"])
    return table


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench bf16_error", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--goldens", type=pathlib.Path, help="a folder of golden cases")
    folder = parser.parse_args(arguments).goldens
    tables = {name: errors(sample) for name, sample in samples(folder)}
    if not tables:
        sys.exit(f"bench: {folder}: no golden network with a camera")
    for name, table in tables.items():
        print(f"{name:<16}" + "".join(f"{column:>12}" for column in table))
        for layer in table["bfloat16"]:
            cells = (f"{c[layer]:.1e}" if layer in c else "" for c in table.values())
            print(f"  {layer:<14}" + "".join(f"{cell:>12}" for cell in cells))
    print(json.dumps({"jax": version("jax"), "error": tables}))
