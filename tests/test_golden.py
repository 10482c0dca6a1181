"""The golden runner itself, and every case of ../shared/golden and golden_v2 where those folders exist."""

import json
import pathlib

import numpy as np
import pytest

from tests import golden

pytestmark = pytest.mark.long

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"
FOLDERS = [SHARED / "golden", SHARED / "golden_v2"]
CASES = [(folder, name) for folder in FOLDERS for name in golden.case_names(folder)]


@pytest.mark.skipif(not CASES, reason=f"no golden cases in {SHARED}")
@pytest.mark.parametrize(("folder", "name"), CASES, ids=[name for _, name in CASES])
def test_golden_case(folder, name):
    results = golden.run_case(folder, name, golden.handlers())
    assert not [str(r) for r in results if not r.passed]


def _write(folder, name, arrays):
    np.savez(folder / f"{name}.npz", **arrays)
    (folder / f"{name}.json").write_text(json.dumps({"config": {"scale": 2.0}, "weights": []}))


def _twice(case):
    yield "y", case["x"] * case.config["scale"], case["y"], golden.Tolerance(rtol=1e-6)


def test_runner_passes_fails_and_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(golden, "handlers", lambda: {"twice": _twice})
    x = np.linspace(-1, 1, 5, dtype=np.float32)
    _write(tmp_path, "twice", {"x": x, "y": 2 * x})
    assert golden.run(tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["twice y 0.000e+00 0.000e+00 PASS", "1 passed, 0 failed"]

    _write(tmp_path, "twice_b", {"x": x, "y": 2 * x + 1e-4})
    assert golden.run(tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "1 passed, 1 failed" and lines[-2].endswith("FAIL")


@pytest.mark.parametrize(
    "name, arrays, said",
    [
        ("other", {"x": [1.0]}, "unknown case"),
        ("twice", {"x": [1.0], "y": [2.0], "z": [0.0]}, "not read by its handler"),
        ("twice", {"x": [1.0], "y": [2.0, 2.0]}, "shape (1,), golden (2,)"),
        ("twice", {"x": [np.nan], "y": [2.0]}, "inf"),
        ("twice", {"y": [2.0]}, "KeyError"),
        ("twicer", {"x": [1.0], "y": [2.0]}, "unknown case"),
    ],
)
def test_runner_refuses(tmp_path, monkeypatch, capsys, name, arrays, said):
    monkeypatch.setattr(golden, "handlers", lambda: {"twice": _twice})
    _write(tmp_path, name, {k: np.array(v) for k, v in arrays.items()})
    assert golden.run(tmp_path) == 1
    assert said in capsys.readouterr().out


def test_empty_folder_fails(tmp_path, capsys):
    assert golden.run(tmp_path) == 1
    assert capsys.readouterr().out.endswith("0 passed, 0 failed\n")
