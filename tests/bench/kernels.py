"""Our attention kernels beside splash attention: static cycles on four TPU generations, and the targets.

For each shape of `kernels_pallas.shapes`, one head at head_dim 128, bfloat16: the cycles of an unmasked and of a
masked tile (`static_cycles`) times how many of each the mask has, for our fixed_max form and for splash with the best
of its tiles for that mask on that generation (`splash.BEST`). `bound` is what the matrix units need for the visible
pairs, `VMEM` what the compiled kernel takes, spills included, of what a TensorCore has.

A row that misses its target but sits on the time its own matrix products take is marked so: no schedule is shorter.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Iterator

from kernels_pallas import shapes, tiles
from kernels_pallas.steps import Plan
from tests.bench import splash
from tests.bench.static_cycles import CHIPS, TOPOLOGIES, CompileError, Kernel, measure, plan_cycles

# Case: (mask of `splash.MASKS`, backward, program of `aot_cases` that holds the kernel). A backward program holds the
# forward kernels too, so one compilation serves both cases of a mask.
CASES = {
    "full forward": ("full", False, "flash_full_backward"),
    "full backward": ("full", True, "flash_full_backward"),
    "block-causal forward": ("causal", False, "flash_block_causal_backward"),
    "block-causal backward": ("causal", True, "flash_block_causal_backward"),
    "cached forward": ("cached", False, "cached_forward"),
}
# Cycles over splash's, at most; on v5e and v5p, on v6e and tpu7x.
TARGETS = {
    "full forward": (0.97, 0.66),
    "full backward": (1.00, 0.80),
    "block-causal forward": (0.95, 0.66),
    "block-causal backward": (1.00, 0.80),
    "cached forward": (0.97, 0.66),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """Cycles of one head at one shape, ours and splash's; `array`: what our matrix products take of ours."""

    case: str
    chip: tiles.Generation
    ours: int
    array: int
    splash: int
    bound: int
    vmem: float

    @property
    def ratio(self) -> float:
        return self.ours / self.splash

    @property
    def target(self) -> float:
        return TARGETS[self.case][CHIPS[self.chip].side == 256]

    @property
    def verdict(self) -> str:
        if self.ratio <= self.target:
            return "met"
        return "missed, all of it matrix products" if self.ours <= 1.001 * self.array else "MISSED"

    def __str__(self):
        return (
            f"kernels {self.case:<21} {self.chip:<5} cycles {self.ours:>10,} splash {self.splash:>10,}"
            f" bound {self.bound:>10,} ({self.bound / self.ours:.2f} of peak)"
            f" VMEM {self.vmem:4.1f} of {tiles.VMEM_MIB[self.chip]} MiB"
            f" ratio {self.ratio:.3f} target {self.target:.2f} {self.verdict}"
        )


def build(devices, case: str):
    from kernels_pallas import aot_cases

    return aot_cases.CASES[case](devices)


def row(chip: tiles.Generation, case: str, found: list[Kernel], theirs: int) -> Row:
    """`found`: the kernels of the case's program. `theirs`: splash's cycles."""
    mask, backward, _ = CASES[case]
    cached = mask == "cached"
    visible = splash.MASKS[mask]
    keys = shapes.CONTEXT if cached else visible.m
    chosen = tiles.choose(chip, visible.n, keys, cached)
    tile = chosen.backward if backward else chosen.fixed_max
    name = f"flash_backward_{tile.form}" if backward else "flash_forward_fixed_max"
    kernel = next(k for k in found if name in k.name)
    if cached:
        plan = Plan(shapes.CACHED, tile.block_q, tile.block_k, slots=shapes.CONTEXT, limited=True)
    else:
        plan = Plan(visible, tile.block_q, tile.block_k, "keys" if backward else "queries")
    bound = (10 if backward else 4) * visible.pairs * shapes.HEAD_DIM // CHIPS[chip].flops
    ours, array = plan_cycles(kernel, plan), plan_cycles(kernel, plan, array=True)
    return Row(case, chip, ours, array, theirs, bound, kernel.vmem / 2**20)


def run(chips=tuple(TOPOLOGIES)) -> Iterator[str]:
    """The printed rows, each as soon as it is known: 12 compilations of ours and 20 of splash, minutes on two cores."""
    missed = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {}
        for chip in chips:
            for mask, backward, program in CASES.values():
                if (chip, program) not in jobs:
                    jobs[chip, program] = pool.submit(
                        measure, "tests.bench.kernels:build", chip, case=program
                    )
                blocks = splash.BEST[mask, backward, chip]
                jobs[chip, mask, backward] = pool.submit(splash.cycles, chip, mask, backward, blocks)
        for chip in chips:
            for case, (mask, backward, program) in CASES.items():
                try:
                    done = row(chip, case, jobs[chip, program].result(), jobs[chip, mask, backward].result())
                except CompileError as error:
                    missed.append(f"{case} on {chip}")
                    yield f"kernels {case:<21} {chip:<5} did not compile: {error}"
                    continue
                if done.verdict != "met":
                    missed.append(f"{case} on {chip} ({done.ratio:.3f} > {done.target:.2f})")
                yield str(done)
    yield f"kernels: {len(chips) * len(CASES) - len(missed)} of {len(chips) * len(CASES)} targets met" + (
        f"; not: {', '.join(missed)}" if missed else ""
    )


if __name__ == "__main__":
    for line in run():
        print(line, flush=True)
