"""Runs a folder of golden cases: `python -m tests.golden DIR`.

A case is `NAME.json` (seed, config, weight files) with `NAME.npz` (arrays). Handlers live in
`tests/goldens/*.py`: each module has `CASES: dict[str, Handler]`, from a case name prefix to a generator of
`(tensor, ours, golden, Tolerance)`. A prefix stands for its own name and for anything that follows it after
an underscore; the longest one wins. Every size comes from the case itself, so another folder with other
seeds and shapes runs as well.

Prints `case tensor max_abs max_rel PASS|FAIL` a tensor, then `N passed, N failed`. It fails on a tensor out
of tolerance, a wrong shape, a non-finite number, an exception, an array of the case that no handler looked
at, an unknown case, and a folder without cases.
"""

import argparse
import dataclasses
import importlib
import json
import pathlib
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator

import jax
import numpy as np
from safetensors.numpy import load_file

import tests.goldens


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """|ours - golden| <= atol + rtol * max|golden|. Both zero means equal, as for integers and masks."""

    rtol: float = 0.0
    atol: float = 0.0


EXACT = Tolerance()


class Case:
    """One golden case. `case[name]` is an array; the runner fails on arrays nobody asked for."""

    def __init__(self, folder: pathlib.Path, name: str):
        about = json.loads((folder / f"{name}.json").read_text())
        self.name = name
        self.config: dict = about["config"]
        self._weight_files = [folder / file for file in about["weights"]]
        with np.load(folder / f"{name}.npz") as arrays:
            self._arrays = {key: arrays[key] for key in arrays.files}
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        self._read.add(name)
        return self._arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def names(self, prefix: str = "") -> list[str]:
        """Names of the arrays that start with `prefix`, sorted. Listing them does not count as reading."""
        return sorted(name for name in self._arrays if name.startswith(prefix))

    def prefixes(self) -> list[str]:
        """The distinct parts of array names before the first slash, sorted."""
        return sorted({name.split("/", 1)[0] for name in self._arrays if "/" in name})

    def unread(self) -> list[str]:
        return sorted(set(self._arrays) - self._read)

    def weights(self, contains: str = "") -> dict[str, np.ndarray]:
        """The published state dict: all weight files whose name contains the given text, merged."""
        merged = {}
        for file in self._weight_files:
            if contains in file.name:
                merged |= load_file(file)
        return merged


Handler = Callable[[Case], Iterator[tuple[str, np.ndarray, np.ndarray, Tolerance]]]


@dataclasses.dataclass(frozen=True)
class Result:
    case: str
    tensor: str
    max_abs: float
    max_rel: float
    passed: bool
    note: str = ""

    def __str__(self) -> str:
        words = (self.case, self.tensor, f"{self.max_abs:.3e}", f"{self.max_rel:.3e}")
        return " ".join((*words, "PASS" if self.passed else "FAIL", self.note)).rstrip()


def _failure(case: str, tensor: str, note: str) -> Result:
    return Result(case, tensor, float("inf"), float("inf"), False, note)


def compare(case: str, tensor: str, ours, golden, tolerance: Tolerance) -> Result:
    ours, golden = np.asarray(ours), np.asarray(golden)
    if ours.shape != golden.shape:
        return _failure(case, tensor, f"shape {ours.shape}, golden {golden.shape}")
    if golden.size == 0:
        return _failure(case, tensor, "empty golden array")
    difference = np.abs(ours.astype(np.float64) - golden.astype(np.float64))
    scale = float(np.abs(golden.astype(np.float64)).max())
    max_abs = float(difference.max()) if np.isfinite(difference).all() else float("inf")
    max_rel = max_abs / scale if scale > 0 else (0.0 if max_abs == 0 else float("inf"))
    return Result(case, tensor, max_abs, max_rel, max_abs <= tolerance.atol + tolerance.rtol * scale)


def handlers() -> dict[str, Handler]:
    """All registered handlers.

    Raises:
      ValueError: two modules claim the same prefix.
    """
    found: dict[str, Handler] = {}
    for module in pkgutil.iter_modules(tests.goldens.__path__):
        cases = importlib.import_module(f"tests.goldens.{module.name}").CASES
        twice = set(found) & set(cases)
        if twice:
            raise ValueError(f"golden prefixes registered twice: {sorted(twice)}")
        found |= cases
    return found


def match(name: str, table: dict):
    """The entry of the longest prefix of `name` in `table`, or None."""
    fitting = [p for p in table if name == p or name.startswith(p + "_")]
    return table[max(fitting, key=len)] if fitting else None


def case_names(folder: pathlib.Path) -> list[str]:
    return sorted({p.stem for p in folder.glob("*") if p.suffix in (".json", ".npz")})


def run_case(folder: pathlib.Path, name: str, table: dict[str, Handler]) -> list[Result]:
    """Results of one case; anything that goes wrong in it is a failed result."""
    handler = match(name, table)
    if handler is None:
        return [_failure(name, "-", "unknown case")]
    results = []
    try:
        case = Case(folder, name)
        with jax.default_matmul_precision("highest"):
            for tensor, ours, golden, tolerance in handler(case):
                results.append(compare(name, tensor, ours, golden, tolerance))
    except Exception as error:  # a broken case must not hide the others
        traceback.print_exc()
        return [*results, _failure(name, "-", f"{type(error).__name__}: {error}".splitlines()[0])]
    if not results:
        return [_failure(name, "-", "nothing was compared")]
    return results + [_failure(name, tensor, "not read by its handler") for tensor in case.unread()]


def run(folder: pathlib.Path) -> int:
    """Runs every case of the folder and prints the report; returns the exit code."""
    table = handlers()
    passed = failed = 0
    names = case_names(folder)
    for name in names:
        for result in run_case(folder, name, table):
            print(result, flush=True)
            passed += result.passed
            failed += not result.passed
    if not names:
        print(f"{folder}: no golden cases (NAME.json with NAME.npz)")
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0 or not names)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    return run(parser.parse_args().folder)


if __name__ == "__main__":
    sys.exit(main())
