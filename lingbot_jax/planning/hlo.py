"""Reads a compiled program: what it computes and moves, per device and step.

`compiled.cost_analysis()` counts a loop's body once; a training step is mostly loops over layers. Here the text
of the optimised program is parsed, and every computation is weighted by how often it runs.
"""

import collections
import dataclasses
import functools
import math
import re

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2}
_BYTES |= {"s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
# Opcodes that name values or run other computations, and move nothing themselves.
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call"}
KERNEL = 'custom_call_target="tpu_custom_call"'  # of a hand-written kernel's instruction
_FREE |= {"after-all", "iota", "partition-id", "replica-id", "opt-barrier"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """dtype, dimensions, and whether the array lives in the chip's scratch memory instead of HBM."""

    dtype: str
    dims: tuple[int, ...]
    scratch: bool

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return int(self.elements * _BYTES.get(self.dtype, 0))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = shapes opcode(arguments), rest`."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    arguments: str
    rest: str

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(re.findall(r"%([\w.\-]+)", self.arguments))

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found and found[1]


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(d) for d in dims.split(",") if d), "S(" in (layout or ""))
        for dtype, dims, layout in _SHAPE.findall(text)
    )


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    at = head.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    opcode = re.match(r" *([\w\-]+)\(", line[end:])
    if not opcode:
        return None
    start = end + opcode.end() - 1
    stop = _closing(line, start)
    return Instruction(head[1], opcode[1], _shapes(line[at:end]), line[start + 1 : stop], line[stop + 1 :])


class HloModule:
    """The optimised HLO text of one device's program."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if header and " = " not in line.split("(")[0]:
                current = self.computations[header[2]] = {}
                self.entry = header[2] if header[1] else self.entry
            elif made := _instruction(line):
                current[made.name] = made
        if not self.entry:
            raise ValueError("not an HLO module: no ENTRY computation")

    def trips(self, loop: Instruction, computation: dict[str, Instruction]) -> range:
        """Values that the counter of a while loop takes: from its start to the constant it is compared with.

        A scan whose first step was taken out of the loop starts at 1.
        """
        found = re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.rest)
        if found:
            return range(int(found[1]))
        condition, start = self.computations[loop.attribute("condition")], 0
        for compare in condition.values():
            if compare.opcode != "compare" or "direction=LT" not in compare.rest:
                continue
            counter, bound = (condition[operand] for operand in compare.operands)
            if bound.opcode != "constant":
                continue
            initial = computation.get(loop.operands[0])
            if initial is not None and initial.opcode == "tuple" and (index := counter.attribute("index")):
                value = computation.get(initial.operands[int(index)])
                while value is not None and value.opcode == "copy":
                    value = computation.get(value.operands[0])
                if value is not None and value.opcode == "constant":
                    start = int(value.arguments)
            return range(start, int(bound.arguments))
        raise ValueError(f"while loop {loop.name}: its number of runs is not a constant")

    def branch(self, made: Instruction) -> str:
        """The computation of a conditional that counts: the costliest is not known, so it is the first."""
        return re.search(r"(?:branch_computations=\{|true_computation=)%?([\w.\-]+)", made.rest)[1]

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs in a step."""
        runs: collections.Counter[str] = collections.Counter()

        def visit(name: str, times: int) -> None:
            runs[name] += times
            for made in self.computations[name].values():
                if made.opcode == "while":
                    visit(made.attribute("body"), times * len(self.trips(made, self.computations[name])))
                elif made.opcode in ("fusion", "async-start", "call"):
                    called = made.attribute("calls") or made.attribute("to_apply")
                    if called in self.computations:
                        visit(called, times)
                elif made.opcode == "conditional":
                    visit(self.branch(made), times)

        visit(self.entry, 1)
        return dict(runs)

    def matmul_flops(self) -> int:
        """FLOPs of dots and convolutions (TPUs compile dots to convolutions); kernels are not in it."""
        return sum(
            times * _contraction_flops(made, self.computations[name])
            for name, times in self.runs.items()
            for made in self.computations[name].values()
            if made.opcode in ("convolution", "dot")
        )

    def products(self, name: str) -> int:
        """As `matmul_flops`, of one run of a computation and of the fusions that it calls."""
        return sum(self.flops_of(made, self.computations[name]) for made in self.computations[name].values())

    def flops_of(self, made: Instruction, computation: dict[str, Instruction]) -> int:
        """Of one instruction, a fusion's with what it fuses."""
        if made.opcode == "fusion":
            return self.products(made.attribute("calls"))
        return _contraction_flops(made, computation) if made.opcode in ("convolution", "dot") else 0

    def kernel_calls(self, name: str) -> list[str]:
        """The JAX operations that hand-written kernels (tpu_custom_call) with `name` in theirs come from."""
        found = []
        for computation in self.runs:
            for made in self.computations[computation].values():
                if made.opcode == "custom-call" and KERNEL in made.rest:
                    found += [operation(made)] if name in made.name else []
        return found

    def kernel_runs(self, name: str) -> int:
        """How often hand-written kernels with `name` in theirs run in a step."""
        return sum(
            times
            for computation, times in self.runs.items()
            for made in self.computations[computation].values()
            if made.opcode == "custom-call" and KERNEL in made.rest and name in made.name
        )

    def hbm_bytes(self) -> int:
        """Bytes read from and written to HBM, taking operands and results of every fused operation once.

        An array that is stacked over the runs of its loop counts as one slice a run.
        """
        fused = {
            m.attribute("calls")
            for c in self.computations.values()
            for m in c.values()
            if m.opcode == "fusion"
        }
        bodies = {
            made.attribute("body"): self.trips(made, self.computations[name]).stop
            for name in self.runs
            for made in self.computations[name].values()
            if made.opcode == "while"
        }
        return int(
            sum(
                times * self.moved(made, self.computations[name], bodies.get(name, 1))
                for name, times in self.runs.items()
                if name not in fused
                for made in self.computations[name].values()
            )
        )

    def moved(self, made: Instruction, computation: dict[str, Instruction], trips: int = 1) -> float:
        """Bytes that one run of an instruction reads from and writes to HBM.

        Args:
          trips: runs of the loop whose body the computation is.
        """
        if made.opcode in _FREE or made.opcode.endswith("-done"):
            return 0.0

        def size(shape: Shape) -> float:
            stacked = trips > 1 and len(shape.dims) > 1 and shape.dims[0] == trips
            return 0.0 if shape.scratch else shape.bytes / (trips if stacked else 1)

        if made.opcode in ("copy-start", "call-start"):  # from, to (or to, from), and handles without a size
            return sum(size(s) for s in made.shapes if s.dims)
        if made.opcode == "slice-start":  # all that it is cut from, the slice, and a handle
            return made.shapes[1].bytes + size(made.shapes[1])
        results = sum(size(s) for s in made.shapes)
        if made.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * results
        if made.opcode == "dynamic-update-slice":
            return 2 * sum(size(s) for s in computation[made.operands[1]].shapes)
        return results + sum(
            size(s) for o in made.operands if o in computation for s in computation[o].shapes
        )

    def stacked_bytes(self, layers: int, known: set[tuple[int, ...]]) -> int:
        """Bytes that the forward loop over layers leaves for the backward loop.

        Args:
          layers: runs of the loop. known: shapes of stacked parameters, which the loop only reads.
        """
        sizes = [0]
        for name in self.runs:
            for made in self.computations[name].values():
                forward = made.opcode == "while" and "transpose(" not in made.rest
                if forward and self.trips(made, self.computations[name]).stop == layers:
                    stacked = [s for s in made.shapes if len(s.dims) > 1 and s.dims[0] == layers]
                    sizes.append(sum(s.bytes for s in stacked if s.dims not in known))
        return max(sizes)


def operation(made: Instruction) -> str:
    """The JAX operation an instruction comes from."""
    found = re.search(r'op_name="([^"]*)"', made.rest)
    return found[1] if found else ""


def _contraction_flops(made: Instruction, computation: dict[str, Instruction]) -> int:
    """2 x results x contracted elements."""
    results = sum(s.elements for s in made.shapes)
    left, right = (computation[o].shapes[0] for o in made.operands[:2])
    if made.opcode == "dot":
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", made.rest)
        return 2 * results * math.prod(left.dims[int(d)] for d in dims[1].split(",") if d)
    labels = re.search(r"dim_labels=\w+_(\w+)->", made.rest)[1]
    contracted = math.prod(d for d, label in zip(right.dims, labels, strict=True) if label != "o")
    window = re.search(r"window=\{([^}]*)\}", made.rest)
    if window and "lhs_dilate" in window[1]:  # a batch dimension written as a dilated window
        sizes = re.search(r"size=([\dx]+)", window[1])[1].split("x")
        dilated = re.search(r"lhs_dilate=([\dx]+)", window[1])[1].split("x")
        for size, dilation in zip(sizes, dilated, strict=True):
            contracted //= int(size) if int(dilation) > 1 else 1
    return 2 * results * contracted
