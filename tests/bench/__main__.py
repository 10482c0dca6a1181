"""`make bench`: every module of this folder with a `run()` prints its rows; names as arguments choose some.

A module with a `main(arguments)` is called alone, with options of its own: `python -m tests.bench miniature --help`.

Timings are medians of ratios to something measured in the same run; nothing here is a timed test.
"""

import importlib
import pkgutil
import sys
import time

import tests.bench


def main(names: list[str]) -> None:
    found = [m.name for m in pkgutil.iter_modules(tests.bench.__path__) if m.name != "__main__"]
    found = [name for name in found if name == names[0]] or found if names else found
    modules = {name: importlib.import_module(f"tests.bench.{name}") for name in found}
    benches = {name: module for name, module in modules.items() if hasattr(module, "run")}
    if names and hasattr(modules.get(names[0]), "main"):
        modules[names[0]].main(names[1:])
        return
    unknown = sorted(set(names) - set(benches))
    if unknown:
        sys.exit(f"bench: unknown {', '.join(unknown)}; choose from {', '.join(sorted(benches))}")
    for name in names or sorted(benches):
        start = time.monotonic()
        print(f"== {name}", flush=True)
        for row in benches[name].run():
            print(row, flush=True)
        print(f"== {name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
