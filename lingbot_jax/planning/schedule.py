"""Seconds of a compiled program in the order that the compiler has put it in.

An operation takes as long as its products or its HBM traffic, whichever is longer; a collective that is not split into
start and done holds up everything; one that is, and a copy between HBM and scratch memory, goes on beside what follows
until it is waited for. Memory and network serve one transfer after another, so the sum is never below what either has
to carry. Work of the vector units, and gaps between operations, are not in it.
"""

import dataclasses
from collections.abc import Callable

from lingbot_jax.planning.collectives import Collective
from lingbot_jax.planning.hlo import KERNEL, HloModule, Instruction


@dataclasses.dataclass
class _Clock:
    """Where the program, the memory and the network are, in seconds; and when what was started will be done."""

    now: float = 0.0
    memory: float = 0.0
    network: float = 0.0
    pending: dict[str, float] = dataclasses.field(default_factory=dict)

    def drained(self) -> float:
        return max(self.now, self.memory, self.network)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Attributes: flops, bandwidth: of a device, per second. network: seconds of a collective's one run, of those
    found by name of the instruction. kernel: seconds of one run of an attention kernel."""

    flops: float
    bandwidth: float
    network: dict[str, float]
    kernel: float


def network_seconds(
    found: list[Collective], bandwidth: Callable[[tuple[str, ...]], float]
) -> dict[str, float]:
    """Seconds of one run of each collective, by the name of its instruction."""
    return {c.name: c.bytes / c.runs / bandwidth(c.axes) for c in found if c.axes}


def scheduled_seconds(module: HloModule, rates: Rates) -> float:
    """Of one run of the program."""
    return _run(module, module.entry, rates, 1)


def _run(module: HloModule, name: str, rates: Rates, trips: int) -> float:
    """Of one run of a computation; `trips`: of the loop whose body it is."""
    computation, clock = module.computations[name], _Clock()
    for made in computation.values():
        if made.opcode == "while":
            runs = module.trips(made, computation)
            body = _run(module, made.attribute("body"), rates, runs.stop)
            clock.now = clock.drained() + len(runs) * body
        elif made.opcode in ("conditional", "call"):
            called = module.branch(made) if made.opcode == "conditional" else made.attribute("to_apply")
            clock.now = clock.drained() + _run(module, called, rates, trips)
        elif made.opcode.endswith("-done"):
            clock.now = max([clock.now, *(clock.pending.pop(o, 0.0) for o in made.operands)])
        else:
            _step(module, made, computation, rates, trips, clock)
    return clock.drained()


def _step(
    module: HloModule,
    made: Instruction,
    computation: dict[str, Instruction],
    rates: Rates,
    trips: int,
    clock: _Clock,
) -> None:
    inside = [made, *_fused(module, made)]
    compute = module.flops_of(made, computation) / rates.flops
    if made.opcode == "custom-call" and KERNEL in made.rest:
        compute = rates.kernel
    sent = sum(rates.network.get(x.name, 0.0) for x in inside)
    moved = module.moved(made, computation, trips) / rates.bandwidth
    clock.memory = max(clock.memory, clock.now) + moved if moved else clock.memory
    clock.network = max(clock.network, clock.now) + sent if sent else clock.network
    targets = [x.rest for x in inside]
    chain = next((c for x in inside if (c := x.attribute("chain_id"))), None)
    if made.opcode.endswith("-start"):
        clock.pending[made.name] = max(clock.memory if moved else 0.0, clock.network if sent else 0.0)
        return
    ends = [clock.now + compute, clock.memory if moved else 0.0]
    if any('"AsyncCollectiveStart"' in rest for rest in targets):
        clock.pending[f"chain {chain}"] = clock.network
    elif sent:
        ends.append(clock.network)
    if any('"AsyncCollectiveDone"' in rest for rest in targets):
        ends.append(clock.pending.pop(f"chain {chain}", 0.0))
    clock.now = max(clock.now, *ends)


def _fused(module: HloModule, made: Instruction) -> list[Instruction]:
    called = made.attribute("calls") if made.opcode in ("fusion", "async-start") else None
    return list(module.computations[called].values()) if called in module.computations else []
