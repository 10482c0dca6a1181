"""The collectives of a compiled program, each traced to the mesh axes that it spans."""

import dataclasses
import math
import re

import numpy as np

from lingbot_jax.parallel.mesh import DATA
from lingbot_jax.planning.hlo import HloModule, Instruction, Shape, operation

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of one step.

    Attributes:
      kind: e.g. `all-gather`. axes: mesh axes it spans. shapes: of its results.
      bytes: a device receives, all runs of a step together, if done in the fewest bytes (ring).
      runs: times a step. op: the JAX operation it comes from. name: of the instruction.
    """

    kind: str
    axes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    bytes: float
    runs: int
    op: str
    name: str = ""


def collectives(module: HloModule, mesh_shape: dict[str, int]) -> list[Collective]:
    """Every collective of a program, with the axes of the mesh (name -> size, outermost first) that it spans."""
    found = []
    starts = {
        name
        for name in module.runs
        if any('"AsyncCollectiveStart"' in made.rest for made in module.computations[name].values())
    }
    for name, times in module.runs.items():
        for made in module.computations[name].values():
            if slices := _between_slices(made):
                kind, members = slices
                received = _received(kind, made.shapes[0].bytes, members) * times
                found.append(
                    Collective(kind, (DATA,), made.shapes[:1], received, times, operation(made), made.name)
                )
                continue
            kind = made.opcode.removesuffix("-start")
            # One collective that is spread over several fusions stands in each: it counts where it starts.
            if kind not in _KINDS or ("chain_id=" in made.rest and name not in starts):
                continue
            groups = replica_groups(made.rest)
            axes = _axes(groups, mesh_shape)
            shapes = made.shapes[-1:] if made.opcode.endswith("-start") else made.shapes
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
                shapes = tuple(Shape(s.dtype, (s.elements // groups.shape[1],), s.scratch) for s in shapes)
            received = _received(kind, sum(s.bytes for s in shapes), groups.shape[1])
            found.append(Collective(kind, axes, shapes, received * times, times, operation(made), made.name))
    return found


def _between_slices(made: Instruction) -> tuple[str, int] | None:
    """(kind, slices) of a collective over the data-centre network: a `send` that the runtime carries out."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', made.rest)
    if made.opcode != "send" or not kind:
        return None
    members = re.search(r'_xla_megascale_target="\{([\d,]+)\}', made.rest)
    return kind[1].lower().replace("_", "-"), len(members[1].split(","))


def _received(kind: str, result: int, group: int) -> float:
    """Bytes a device receives for a result of so many bytes, in the fewest-bytes algorithm."""
    share = (group - 1) / group
    return {
        "all-gather": result * share,
        "reduce-scatter": result * (group - 1),
        "all-reduce": 2 * result * share,
        "all-to-all": result * share,
        "collective-permute": result,
    }[kind]


def _iota(spec: str) -> np.ndarray:
    """Flat ids of `[2,4]T(1,0)` or `[8]`: counted up in that shape, then transposed."""
    dims = [int(d) for d in re.search(r"\[([\d,]+)\]", spec)[1].split(",")]
    order = re.search(r"T\(([\d,]+)\)", spec)
    ids = np.arange(math.prod(dims)).reshape(dims)
    return (ids.transpose([int(d) for d in order[1].split(",")]) if order else ids).ravel()


def replica_groups(attributes: str) -> np.ndarray:
    """Int [groups members] from any of the three forms HLO prints, or from a permute's pairs (as one group)."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
        moved = np.array([[int(i) for i in p.split(",")] for p in re.findall(r"\{([\d,]+)\}", pairs[1])])
        return moved[:, :2]
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return np.array([[int(i) for i in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", listed[1])])
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _iota(counted[2]).reshape([int(d) for d in counted[1].split(",")])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}", attributes)
    if not named:
        raise ValueError(f"replica groups of an unknown form: {attributes[:160]!r}")
    sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
    count = math.prod(sizes.values())
    ids = (_iota(named[2]) if named[2] else np.arange(count)).reshape(list(sizes.values()))
    chosen = re.findall(r"'(\w+)'", named[3])
    if re.search(r"\(\d+\)", named[3]):
        raise ValueError(f"replica groups over a part of an axis are not read: {named[3]!r}")
    last = [list(sizes).index(axis) for axis in chosen]
    kept = [i for i in range(len(sizes)) if i not in last]
    return ids.transpose(kept + last).reshape(-1, math.prod(sizes[a] for a in chosen))


def _axes(groups: np.ndarray, mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """Names of the mesh axes along which members of a group differ."""
    places = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())))  # [axis group member]
    varied = (places != places[:, :, :1]).any((1, 2))
    return tuple(name for name, differs in zip(mesh_shape, varied, strict=True) if differs)
