"""Cycles of a Pallas TPU kernel from the compiler's own schedule; no TPU needed.

libtpu compiles ahead of time and, asked to, writes the VLIW schedule of every kernel. A bundle is one issue slot.
The cycles of a region of the schedule are the larger of its bundles (loops expanded) and of what its vmatmuls take
in the busiest matrix unit: an input queue hides bursts, but the unit cannot be faster than that. That is the
low end of what a run can take; waits for HBM are not in it.

A kernel has up to three *variants* of its tile (unmasked, unmasked in a cache, masked): predicated regions, each
with a like share of the kernel's matrix products.

The dump is text without a documented format; this reads that of libtpu 0.0.42 to 0.0.52.
"""

import collections
import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from kernels_pallas.steps import CLEAR, MASKED, Plan

TOPOLOGIES = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x1", "v6e": "v6e:2x4", "tpu7x": "tpu7x:2x2x1"}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Matrix units of a TensorCore: `units` arrays of side x side that take `rows` bf16 rows a cycle."""

    units: int
    side: int
    rows: int
    branch_delay: int

    @property
    def flops(self) -> int:
        """Peak bf16 FLOPs a cycle."""
        return 2 * self.units * self.side * self.side * self.rows


# Public peaks over clocks (197 T at 1.5 GHz, 459 T at 1.75 on two cores, 918 T, 2307 T on two cores).
CHIPS = {
    "v5e": Chip(4, 128, 1, 4),
    "v5p": Chip(4, 128, 1, 4),
    "v6e": Chip(2, 256, 2, 4),
    "tpu7x": Chip(2, 256, 2, 2),
}

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|\d+)\s+(?:(?:LH|LB|LE|PB|PF|CT))?\s*:[ >]*\{")
_MARK = re.compile(r"(Start|End) region (\d+)|Start/End empty region (\d+)")
_BRANCH = re.compile(r"sbr\.rel(?:\.\w+)* (?:\(!?%\S+?\) )?target = \$region(\d+)")
_EXIT = re.compile(r"scmp\.(?:ge|eq)\.\w+\.totalorder %\S+?, (\d+)\s*/\*[^*]*loop exit test")
_MATMUL = re.compile(r"\bvmatmul(\S*?)\.mxu(\d)")
_VMEM = re.compile(r"#allocation\d+\S* \[shape = .*?space=vmem, size = (0x[0-9a-f]+)")


@dataclasses.dataclass
class Region:
    """Bundles [start, end]; a loop runs `trips` times."""

    start: int
    end: int
    loop: bool = False
    trips: int = 1
    children: list["Region"] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way through a tile: issue slots, busiest matrix unit, and the larger of the two."""

    bundles: int
    array: int

    @property
    def cycles(self) -> int:
        return max(self.bundles, self.array)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel's variants, the unmasked one first, and its scoped VMEM in bytes."""

    name: str
    variants: tuple[Variant, ...]
    vmem: int


def _regions(bundles: list[str], delay: int) -> Region:
    starts, spans, branches, exits = {}, [], [], []
    for i, text in enumerate(bundles):
        for kind, number, empty in _MARK.findall(text):
            if kind == "End":
                if number in starts:
                    spans.append(Region(starts[number], i))
            else:
                starts.setdefault(empty, i) if empty else starts.__setitem__(number, i)
        branches += [(i, target) for target in _BRANCH.findall(text)]
        exits += [(i, int(trips)) for trips in _EXIT.findall(text)]
    last = len(bundles) - 1
    for at, target in branches:
        start = starts.get(target)
        if start is not None and start <= at:
            trips = [n for i, n in exits if start <= i <= at]
            spans.append(Region(start, min(at + delay, last), True, trips[-1] if trips else 1))
    root = Region(0, last)
    stack = [root]
    for region in sorted(spans, key=lambda r: (r.start, -r.end, r.loop)):
        while len(stack) > 1 and region.end > stack[-1].end:
            stack.pop()
        stack[-1].children.append(region)
        stack.append(region)
    return root


def _inner_loops(region: Region):
    for child in region.children:
        if child.loop:
            yield child
        else:
            yield from _inner_loops(child)


def _expanded(region: Region, weight) -> int:
    """Sum of weight(start, end) over a region, loops inside as often as they run."""
    total = weight(region.start, region.end)
    for loop in _inner_loops(region):
        total += _expanded(loop, weight) * loop.trips - weight(loop.start, loop.end)
    return total


def _read_kernel(name: str, bundles: list[str], vmem: int, chip: Chip) -> Kernel:
    issued = [[collections.Counter(), 0] for _ in bundles]
    for i, text in enumerate(bundles):
        for kind, unit in _MATMUL.findall(text):
            issued[i][0][unit] += (16 if "bf16" in kind else 8) // chip.rows
            issued[i][1] += 1
    count = lambda a, b: sum(n for _, n in issued[a : b + 1])
    root = _regions(bundles, chip.branch_delay)

    def descend(region: Region) -> list[Region]:
        """The innermost regions that hold at least 0.3 of their parent's products."""
        holds = count(region.start, region.end)
        kids = [c for c in region.children if count(c.start, c.end) and count(c.start, c.end) >= 0.3 * holds]
        return [r for kid in kids for r in descend(kid)] or [region]

    def variant(region: Region) -> Variant:
        units = {unit for busy, _ in issued for unit in busy}
        busy = lambda unit: lambda a, b: sum(c[unit] for c, _ in issued[a : b + 1])
        array = max((_expanded(region, busy(unit)) for unit in units), default=0)
        return Variant(_expanded(region, lambda a, b: b - a + 1), array)

    # Masked variants cost more: the cheapest comes first.
    return Kernel(name, tuple(sorted(map(variant, descend(root)), key=lambda v: v.cycles)), vmem)


def read_dump(folder: pathlib.Path, chip: Chip) -> list[Kernel]:
    """Every Pallas kernel of a dump."""
    found = []
    for path in sorted(folder.rglob("*-final_bundles.txt")):
        match = re.match(r"(\d+-(.+?))-\d+-final_bundles\.txt$", path.name)
        if not match or match[2] == "TLP" or match[2].startswith("<"):
            continue
        family = [f for f in path.parent.iterdir() if f.name.startswith(match[1] + "-")]
        analysis = [f for f in family if f.name.endswith("-schedule-analysis_final_bundles.txt")]
        if not analysis or "tpu_custom_call" not in analysis[0].read_text(errors="replace"):
            continue
        bundles: list[str] = []
        for line in path.read_text(errors="replace").splitlines():
            if _BUNDLE.match(line):
                bundles.append(line)
            elif bundles:
                bundles[-1] += "\n" + line
        stages = re.compile(r"-(post-delay-converter|post-bundle-packing-post-ra|post-ra|original)\.txt$")
        texts = (f.read_text(errors="replace") for f in family if stages.search(f.name))
        vmem = max((sum(int(x, 0) for x in _VMEM.findall(text)) for text in texts), default=0)
        found.append(_read_kernel(match[2], bundles, vmem, chip))
    return found


def plan_cycles(kernel: Kernel, plan: Plan, array: bool = False) -> int:
    """Of one head: unmasked tiles as the first variant, masked as the last; `array`: the products alone."""
    kinds = plan.kinds()
    cost = [v.array if array else v.cycles for v in (kernel.variants[0], kernel.variants[-1])]
    return int((kinds == CLEAR).sum()) * cost[0] + int((kinds == MASKED).sum()) * cost[1]


class CompileError(RuntimeError):
    """The compiler refused; the message is its last lines."""


def measure(build: str, chip: str, **options) -> list[Kernel]:
    """Compiles `build` ("module:function") for one generation in a process of its own and reads the schedule.

    `function(devices, **options)` returns (fn, args) as `aot_cases.CASES` do. "compiler_options" among the options
    goes to XLA.
    """
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is run on a device, so nothing needs the lock
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=true",
        }
        command = [sys.executable, "-m", "tests.bench.static_cycles", build, chip, json.dumps(options)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise CompileError(" | ".join(done.stderr.strip().splitlines()[-3:])[-600:])
        return read_dump(pathlib.Path(folder), CHIPS[chip])


def _child(build: str, chip: str, options: str) -> None:
    import jax
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    module, function = build.split(":")
    options = json.loads(options)
    compiler_options = options.pop("compiler_options", None)
    fn, args = getattr(importlib.import_module(module), function)(devices, **options)[:2]
    jax.jit(fn).lower(*args).compile(compiler_options=compiler_options)


if __name__ == "__main__":
    _child(*sys.argv[1:])
