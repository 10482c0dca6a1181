"""The command `experiments.plan`: its flags and what it prints."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("libtpu", reason="no libtpu")

COMMAND = [sys.executable, "-m", "experiments.plan", "--config=experiments/configs/w14b.py:world"]
# Two narrow layers at a small size, and a curriculum of one phase.
NARROW = ["--config.world.networks.high.dim=256", "--config.world.networks.high.layers=2"]
NARROW += ["--config.world.networks.high.heads=2", "--config.world.networks.high.ffn=512"]
NARROW += ["--config.curriculum=()", "--config.mesh.seq=2", "--config.data.frames=5", "--config.data.batch=4"]
NARROW += ["--config.tasks.continuation=0.0", "--height=64", "--width=64"]


def run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *flags], capture_output=True, text=True, timeout=600)


def test_the_last_line_of_stdout_is_json_with_fits_first():
    done = run("--topology=v5e:2x4", *NARROW, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    values = json.loads(done.stdout.splitlines()[-1])
    assert next(iter(values)) == "fits" and values["fits"] is True and values["chips"] == 8
    assert "compiling train of phase 0 for v5e:2x4" in done.stderr


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--topology=v5p:banana"], "error: --topology=v5p:banana: "),
        (["--topology=v5p:4x4x4", "--phase=9"], "error: --phase=9: the config has curriculum[0] to [3]"),
        (["--topology=v5p:4x4x4", "--phase=last"], "error: --phase=last: give the index of a phase, or all"),
        ([], "error: --topology is missing"),
        (
            ["--topology=v5p:4x4x4", "--weights=whole"],
            "error: --weights=whole: only of chunk, decode, sample, not",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(flags, words):
    done = run(*flags)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(words)
