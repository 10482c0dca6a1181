"""The roofline of a compiled program: seconds of arithmetic, memory traffic and communication."""

import dataclasses
import math

import numpy as np
from jax.sharding import Mesh

from lingbot_jax.parallel.chips import Chip
from lingbot_jax.planning.collectives import Collective, collectives
from lingbot_jax.planning.hlo import HloModule


def axis_bandwidth(mesh: Mesh, axes: tuple[str, ...], chip: Chip) -> float:
    """Bytes/s a device receives in a ring collective over these mesh axes.

    A ring along a torus dimension receives from both sides, and k dimensions carry k rings at once. Without
    wrap-around a line carries half. Groups whose members are s chips apart share each link with s - 1 others. Over
    slices it is the data-centre network that limits.
    """
    places = [list(mesh.shape).index(a) for a in axes]
    grid = np.moveaxis(mesh.devices, places, range(len(places)))
    line = grid.reshape(math.prod(mesh.shape[a] for a in axes), -1)[:, 0]
    if len({getattr(d, "slice_index", None) for d in line}) > 1:
        return chip.dcn
    everywhere = np.array([d.coords for d in mesh.devices.flat])
    coords = np.array([d.coords for d in line])
    total = 0.0
    for dimension in range(coords.shape[1]):
        positions = np.unique(coords[:, dimension])
        if len(positions) > 1:
            extent = len(np.unique(everywhere[:, dimension]))
            stride = int(np.diff(positions).min())
            wraps = len(positions) * stride == extent and extent % chip.torus == 0
            total += chip.link * (2 if wraps else 1) / stride
    return total or 2 * chip.link  # two cores of one chip


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step by what is used, and what follows from them.

    Attributes:
      matmul, attention: arithmetic. hbm: memory traffic. network: mesh axes joined by "+" -> seconds.
      model_flops: of a step on all chips, without recomputation. peak: FLOP/s of all chips.
    """

    matmul: float
    attention: float
    hbm: float
    network: dict[str, float]
    model_flops: float
    peak: float

    @property
    def terms(self) -> dict[str, float]:
        return {
            "compute": self.matmul + self.attention,
            "hbm": self.hbm,
            "network": sum(self.network.values()),
        }

    @property
    def seconds(self) -> float:
        """With everything else hidden behind the longest term."""
        return max(self.terms.values())

    @property
    def bound_by(self) -> str:
        return max(self.terms, key=self.terms.get)

    @property
    def mfu(self) -> float:
        return self.model_flops / (self.seconds * self.peak)

    @property
    def mfu_exposed(self) -> float:
        """If no byte on the network were hidden behind arithmetic."""
        busy = max(self.terms["compute"], self.terms["hbm"]) + self.terms["network"]
        return self.model_flops / (busy * self.peak)


def roofline(
    module: HloModule, mesh: Mesh, chip: Chip, *, attention_flops: float, model_flops: float
) -> tuple[Roofline, list[Collective]]:
    """The roofline of a compiled step, and its collectives.

    Args:
      attention_flops: that one device runs inside hand-written kernels in a step, recomputation included.
      model_flops: of the whole step on all devices, without recomputation.
    """
    found = collectives(module, dict(mesh.shape))
    network: dict[str, float] = {}
    for collective in found:
        if collective.axes:
            name = "+".join(collective.axes)
            network[name] = network.get(name, 0.0) + collective.bytes / axis_bandwidth(
                mesh, collective.axes, chip
            )
    return Roofline(
        matmul=module.matmul_flops() / chip.flops,
        attention=attention_flops / (chip.flops * chip.attention),
        hbm=module.hbm_bytes() / chip.bandwidth,
        network=network,
        model_flops=model_flops,
        peak=chip.flops * mesh.size,
    ), found


def collective_bytes(found: list[Collective]) -> dict[str, dict[str, int]]:
    """Bytes a device receives in a step: kind -> axes joined by "+" -> bytes."""
    table: dict[str, dict[str, int]] = {}
    for collective in found:
        row = table.setdefault(collective.kind, {})
        name = "+".join(collective.axes) or "none"
        row[name] = row.get(name, 0) + round(collective.bytes)
    return table
