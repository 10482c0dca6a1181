"""What a sharded step is meant to hold and send, and everything in a compiled one that departs from it.

weights      all-gather over seq, then fsdp, twice a microstep (forward, recomputation)
gradients    reduce-scatter over fsdp, then seq; what is left is summed over data
tokens       all-to-all (Ulysses) or collective-permute (ring) over seq
the rest     sums of vectors, of the text's gradients and of numbers
state        every matrix, moment and average split over fsdp x seq
"""

import dataclasses
import math

from lingbot_jax.parallel.mesh import DATA, FSDP, SEQ
from lingbot_jax.planning.collectives import Collective

PADDING = 8 << 20  # bytes of arguments: vectors are padded to whole tiles
SLACK = 1.1  # the compiler pads what it scatters, and gathers some small parameters in the same way
SUMMED = 0.2  # of the scattered bytes: the sums that are meant
# A register: pieces that are not whole ones are not scattered by the compiler, but summed.
ROWS, LANES = 8, 128


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix of `parallel.sharding.linear`: its sizes, in how many layers, bytes per value when it is sent, and
    whether it has a gradient."""

    sizes: tuple[int, int]
    layers: int
    itemsize: int
    trains: bool = True

    @property
    def bytes(self) -> int:
        return math.prod(self.sizes) * self.layers * self.itemsize


@dataclasses.dataclass(frozen=True)
class Intended:
    """What to hold a compiled step against.

    Attributes:
      mesh: size of each axis. matrices: all of the model. microsteps: of a step.
      tokens: of a sample. text: tokens of its text. width: of the narrowest activation in a block, that of a head.
      samples: on a device.
      small: bytes of the gradients of all other parameters, which the compiler sums or scatters as it likes.
    """

    mesh: dict[str, int]
    matrices: tuple[Matrix, ...]
    microsteps: int
    tokens: int
    text: int
    width: int
    samples: int
    small: int = 0

    def bytes(self) -> dict[str, dict[str, float]]:
        """Bytes a device receives in a step for its weights and gradients: kind -> axis -> bytes."""
        fsdp, seq = self.mesh[FSDP], self.mesh[SEQ]
        stages = {SEQ: (seq - 1) / seq / fsdp, FSDP: (fsdp - 1) / fsdp}
        weights = sum(m.bytes for m in self.matrices) * self.microsteps
        gradients = sum(m.bytes for m in self.matrices if m.trains) * self.microsteps
        return {
            "all-gather": {axis: 2 * weights * share for axis, share in stages.items()},
            "reduce-scatter": {axis: gradients * share for axis, share in stages.items()},
        }

    def faults(self, found: list[Collective]) -> list[str]:
        """One line for every departure; empty if the step sends what it should."""
        lines, small = [], self.small * self.microsteps
        for collective in found:
            for shape in collective.shapes:
                what = (
                    f"{collective.kind} of {shape.dtype}{list(shape.dims)} over {'+'.join(collective.axes)}"
                )
                if self._gathers_tokens(collective, shape.dims):
                    lines.append(f"{what}: the tokens of whole samples ({collective.op})")
                if self._sums_matrix(collective, shape.dims):
                    lines.append(f"{what}: a whole gradient, not scattered ({collective.op})")
        for kind, row in self.bytes().items():
            for axis, limit in row.items():
                sent = sum(c.bytes for c in found if c.kind == kind and axis in c.axes)
                if sent > SLACK * limit + (small if kind == "reduce-scatter" else 0):
                    lines.append(f"{kind} over {axis}: {sent / 1e9:.3g} GB, meant are {limit / 1e9:.3g}")
        summed = sum(c.bytes for c in found if c.kind == "all-reduce" and {FSDP, SEQ} & set(c.axes))
        limit = sum(self.bytes()["reduce-scatter"].values())
        if summed > SUMMED * limit + 2 * small:
            lines.append(f"all-reduce: {summed / 1e9:.3g} GB, while {limit / 1e9:.3g} are to be scattered")
        across = {c.kind for c in found if DATA in c.axes} - {"all-reduce"}
        if across:
            lines.append(f"{', '.join(sorted(across))} over data, where only gradients are summed")
        return list(dict.fromkeys(lines))

    def _gathers_tokens(self, collective: Collective, dims: tuple[int, ...]) -> bool:
        """Whether neighbouring dimensions (frames, tokens a frame, samples) multiply to the tokens of samples."""
        if SEQ not in collective.axes or collective.kind not in ("all-gather", "all-reduce"):
            return False
        if math.prod(dims) < self.tokens * self.width:
            return False
        runs = [dims[i:j] for i in range(len(dims)) for j in range(i + 1, min(i + 3, len(dims)) + 1)]
        return bool({math.prod(run) for run in runs} & {self.tokens * (n + 1) for n in range(self.samples)})

    def _sums_matrix(self, collective: Collective, dims: tuple[int, ...]) -> bool:
        """Whether this is a sum over fsdp or seq of what should be scattered there."""
        summed = [axis for axis in (FSDP, SEQ) if axis in collective.axes]
        if collective.kind != "all-reduce" or not summed:
            return False
        if dims[:-1] == (self.samples, self.text):  # the gradient of text, which may be as large
            return False
        parts = math.prod(self.mesh[axis] for axis in summed)
        scattered = self.mesh[FSDP] * self.mesh[SEQ] // parts  # over the other axis, before or not at all
        given = sorted(d for d in dims if d > 1)
        for sizes in (m.sizes for m in self.matrices):
            for split, other in (sizes, sizes[::-1]):
                for rows in {split, split // scattered}:
                    whole_registers = rows % (ROWS * parts) == 0 and other >= LANES
                    if given == sorted((rows, other)) and whole_registers:
                        return True
        return False


def state_faults(
    held: dict[str, int], matrices: dict[str, int], vectors: dict[str, int], devices: int, arguments: int
) -> list[str]:
    """One line for every part of the state that is not split.

    Args:
      held: bytes on a device, by part. matrices, vectors: bytes of each part of the state, unsplit; vectors need not
        be split. devices: of a replica. arguments: bytes of a device's arguments in the compiled program.
    """
    lines = [
        f"{name}: {held[name] / 1e9:.3g} GB a device, more than 1/{devices} of {size / 1e9:.3g} GB"
        for name, size in matrices.items()
        if held[name] > 1.01 * size / devices + vectors[name]
    ]
    if arguments > 1.05 * (known := sum(held.values())) + PADDING:
        lines.append(
            f"arguments: {arguments / 1e9:.3g} GB a device in the program, {known / 1e9:.3g} by shardings"
        )
    return lines
