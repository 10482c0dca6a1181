"""Runs the checks of `eight/` in a process of their own with eight virtual CPU devices.

The number of devices is fixed when JAX starts, and the other tests want one.
"""

import os
import pathlib
import subprocess
import sys

import pytest

from tests import xla

pytestmark = pytest.mark.long

FOLDER = pathlib.Path(__file__).parent / "eight"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("check_*.py")), ids=lambda p: p.stem)
def test_on_eight_devices(path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "python_files=check_*.py", "--durations=3", str(path)],
        env=os.environ | {"XLA_FLAGS": xla.flags(8), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{path.name} on eight devices:\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
    assert " passed" in done.stdout and "skipped" not in done.stdout
