"""How exact the residual stream must be: `python -m tests.bench residual [--layers=40]`.

A narrow network of as many blocks as the published one (head_dim 128, ffn as wide over dim as published), with weights
of two scales: those of the published initialisation (the head Xavier-uniform: at zero it would hide all), and those of
the golden networks (1 / root of fan-in; modulation 0.3, so that gates are of order 0.1 to 1).

Errors against an all-float32 model, as root mean square of the error over that of the values: of tokens by depth, of
the velocity, and of the gradient: all of it, and parameter by parameter. Every rounding that is asked for is kept.

    bfloat16       dtype bfloat16, residual_dtype float32 (the defaults)
    kept           the same with rematerialisation, which keeps the stream as bfloat16 (`layers.rematerialised`)
    stream         both bfloat16
    only stream    dtype float32, residual_dtype bfloat16

Prints a table per network and one JSON line.
"""

import argparse
import dataclasses
import json
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.dit import Condition, WorldDiT
from tests.bench.bf16_error import unfused
from tests.models import numpy_dit, worlds

SETTINGS = {
    "bfloat16": ("bfloat16", "float32", "none"),
    "kept": ("bfloat16", "float32", "full"),
    "stream": ("bfloat16", "bfloat16", "none"),
    "only stream": ("float32", "bfloat16", "none"),
}
FRAMES, HEIGHT, WIDTH = 3, 8, 8


def network(layers: int, scale: str) -> WorldDiT:
    """Parameters rounded to bfloat16, so that casting them is no error."""
    config = DiTConfig(
        dim=256, heads=2, layers=layers, ffn=691, text_dim=64, text_len=16, control="none", dtype="float32"
    )
    if scale == "golden":
        model = worlds.make(config)
    else:
        model = jax.jit(lambda key: WorldDiT(config, key))(jax.random.key(0))
        kernel = model.head.projection.kernel
        limit = (6 / sum(kernel.shape)) ** 0.5
        kernel[...] = jax.random.uniform(jax.random.key(1), kernel.shape, minval=-limit, maxval=limit)
    return jax.tree.map(lambda p: jax.lax.reduce_precision(p, 8, 7), model)


def measure(layers: int, scale: str) -> dict[str, dict[str, float]]:
    """Relative errors by setting."""
    model, rng = network(layers, scale), np.random.default_rng(0)
    draw = lambda c: jnp.asarray(rng.normal(size=(1, FRAMES, HEIGHT, WIDTH, c)), jnp.float32)
    text = jnp.asarray(rng.normal(size=(1, 16, 64)), jnp.float32)
    condition = Condition(text=text, mask=draw(4), image=draw(16))
    inputs = draw(16), jnp.full((1, FRAMES), 833.0), condition, draw(16)
    expected, gradient = unfused(model, *inputs)
    wide = lambda tree: {name: np.asarray(x, np.float64) for name, x in tree.items()}
    expected, gradient = wide(expected), wide(gradient)
    rows = [f"block{i}_out" for i in range(0, layers - 1, max(layers // 5, 1))] + ["blocklast_out", "out"]
    table = {}
    for name, (dtype, stream, remat) in SETTINGS.items():
        change = dataclasses.replace(model.config, dtype=dtype, residual_dtype=stream, remat=remat)
        found, slopes = (wide(x) for x in unfused(worlds.with_config(model, change), *inputs))
        table[name] = {row: numpy_dit.relative(found[row], expected[row]) for row in rows}
        each = {p: numpy_dit.relative(slopes[p], g) for p, g in gradient.items() if np.abs(g).max() > 0}
        joined = lambda tree: np.concatenate([x.ravel() for x in tree.values()])
        table[name] |= {
            "gradient": numpy_dit.relative(joined(slopes), joined(gradient)),
            "gradient, median": float(np.median(list(each.values()))),
            "gradient, worst": max(each.values()),
        }
    return table


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench residual", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--layers", type=int, default=40)
    layers = parser.parse_args(arguments).layers
    tables = {scale: measure(layers, scale) for scale in ("initialisation", "golden")}
    for scale, table in tables.items():
        print(f"{scale:<18}" + "".join(f"{name:>14}" for name in table))
        for row in table["stream"]:
            print(f"  {row:<16}" + "".join(f"{column[row]:>14.1e}" for column in table.values()))
    print(json.dumps({"jax": version("jax"), "layers": layers, "error": tables}))
