"""Runs the checks of `eight/` in one process of their own with eight virtual CPU devices.

The number of devices is fixed when JAX starts, and the other tests want one. One check alone:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest tests/parallel/eight/check_step.py
"""

import os
import pathlib
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from tests import xla

pytestmark = pytest.mark.long

FILES = sorted((pathlib.Path(__file__).parent / "eight").glob("check_*.py"))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What became of every check, how the process ended, and the end of what it said."""
    path = tmp_path_factory.mktemp("eight") / "report.xml"
    command = [sys.executable, "-m", "pytest", "-o", "python_files=check_*.py", f"--junitxml={path}"]
    done = subprocess.run(
        [*command, *map(str, FILES)],
        env=os.environ | {"XLA_FLAGS": xla.flags(8), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    said = f"{done.stdout[-6000:]}{done.stderr[-2000:]}"
    assert path.exists(), f"on eight devices the process ended with {done.returncode}:\n{said}"
    return list(ElementTree.parse(path).iter("testcase")), done.returncode, said


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_on_eight_devices(report, name):
    cases, _, said = report
    found = [case for case in cases if name in case.get("classname").split(".")]
    assert found, f"{name} did not run:\n{said}"
    for case in found:
        bad = [part.get("message") + "\n" + (part.text or "") for part in case if part.tag != "properties"]
        assert not bad, f"{name}: {case.get('name')} on eight devices: {bad[0][-6000:]}"


def test_the_process_ends_well(report):
    _, code, said = report
    assert code == 0, f"on eight devices the process ended with {code}:\n{said}"
