"""Memory of converting a checkpoint, there and back: a made-up transformer of 0.7 billion parameters in eight shards.

Wanted: to a bundle, no more than the largest shard and 2 GiB; to published names, one shard (at most 4 GiB).
"""

import json
import multiprocessing
import pathlib
import re
import tempfile
import time

import numpy as np

from lingbot_jax.convert import contents, names_dit, write
from lingbot_jax.models.config import DiTConfig
from tests.convert import published

CONFIG = DiTConfig(dim=1024, layers=40, heads=8, ffn=2816, text_dim=512, control="cam")
SHARDS = 8


def _to_bundle(folder: pathlib.Path) -> None:
    write.to_bundle(contents.look(str(folder / "published")), folder / "bundle")


def _to_published(folder: pathlib.Path) -> None:
    write.to_published(contents.look(str(folder / "bundle")), folder / "back")


def _mebibytes(field: str) -> float:
    """A line of Linux's account of this process: VmRSS, memory held; VmHWM, the most it ever held."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024


def _measured(work, folder: pathlib.Path, out) -> None:
    before, start = _mebibytes("VmRSS"), time.monotonic()
    work(folder)
    out.put((_mebibytes("VmHWM") - before, time.monotonic() - start))


def run() -> list[str]:
    context, rows = multiprocessing.get_context("spawn"), []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        source = folder / "published" / "high_noise_model"
        source.mkdir(parents=True)
        (source / "config.json").write_text(json.dumps(published.dit_json(CONFIG)))
        table = names_dit.dit_table(CONFIG)
        published.write_sharded(source, published.random_tensors(CONFIG, table, 0, np.float32), SHARDS)
        sizes = [path.stat().st_size / 2**20 for path in source.glob("*.safetensors")]
        for title, work in (("to a bundle", _to_bundle), ("to published names", _to_published)):
            out = context.Queue()
            process = context.Process(target=_measured, args=(work, folder, out))
            process.start()
            grown, seconds = out.get()
            process.join()
            rows.append(
                f"{title}: memory grows by {grown:,.0f} MiB ({seconds:.0f} s; checkpoint {sum(sizes):,.0f} MiB in "
                f"{SHARDS} shards of up to {max(sizes):,.0f} MiB)"
            )
    return rows
