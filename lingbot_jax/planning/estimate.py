"""What a training step costs on a pod: FLOPs from the model's sizes, and the roofline of a compiled step."""

import dataclasses
import math

import numpy as np
from jax.sharding import Mesh

from lingbot_jax.config import ConfigError
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.parallel.hlo import Collective, Program


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a TPU generation.

    Attributes:
      flops: peak bf16 FLOP/s. hbm: bytes; bandwidth: bytes/s. link: bytes/s one way of one ICI link.
      torus: links a ring closes over: a dimension of this many chips (or a multiple) wraps around.
      attention: fraction of peak at which the attention kernels run at head_dim 128, waits for HBM not counted.
      dcn: bytes/s a chip over the data-centre network.
    """

    flops: float
    hbm: float
    bandwidth: float
    link: float
    torus: int
    attention: float
    dcn: float = 3.1e9  # an assumption on the safe side: 100 Gbit/s for a host of four chips


# Peaks and HBM: cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}. One-way ICI bandwidth of a link: the tables of
# jax-ml.github.io/scaling-book/tpus (v5e 4.5e10, v5p 9e10, v6e 9e10); tpu7x: 9.6 Tbit/s a chip over 6 links, both
# ways. A tpu7x chip is two devices, so its figures are halved. Wrap-around: v5e and v6e only in full rows of 16, v5p
# and tpu7x in multiples of 4. `attention`: ideal over static cycles of two forward tiles and a backward one
# (docs/kernels.md), which head_dim 128 limits on 256x256 matrix units.
CHIPS = {
    "v5e": Chip(flops=197e12, hbm=16e9, bandwidth=819e9, link=4.5e10, torus=16, attention=0.97),
    "v5p": Chip(flops=459e12, hbm=95e9, bandwidth=2765e9, link=9e10, torus=4, attention=0.97),
    "v6e": Chip(flops=918e12, hbm=32e9, bandwidth=1640e9, link=9e10, torus=16, attention=0.60),
    "tpu7x": Chip(flops=1153.5e12, hbm=96e9, bandwidth=3690e9, link=5e10, torus=4, attention=0.63),
}


def chip(topology: str) -> Chip:
    """The chip of a topology name such as `v5p:8x8x4`. Raises ConfigError for another generation."""
    generation = topology.partition(":")[0]
    if generation not in CHIPS:
        raise ConfigError(
            f"topology = {topology!r}: generation {generation!r} is not one of {', '.join(CHIPS)}"
        )
    return CHIPS[generation]


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass of one sample (2 a multiply-add).

    Attributes:
      tokens: products with weights, of video tokens. text: of text tokens, which every device of seq repeats.
      cross: cross-attention's scores and values. attention: self-attention's.
    """

    tokens: int
    text: int
    cross: int
    attention: int

    @property
    def total(self) -> int:
        return self.tokens + self.text + self.cross + self.attention


def forward_flops(model: DiTConfig, frames: int, height: int, width: int) -> Flops:
    """FLOPs of WorldDiT, from its sizes.

    Args:
      frames, height, width: of the latents.
    """
    _, rows, columns = model.patch
    d, text = model.dim, model.text_len
    n = frames * (height // rows) * (width // columns)
    taps = rows * columns
    block = 4 * d * d + 2 * d * d + 2 * d * model.ffn  # self-attention, cross-attention q and o, FFN
    outside = d * taps * (model.in_channels + model.latent_channels)
    if model.control != "none":
        block += 4 * d * d
        outside += taps * model.control_channels * d + 2 * d * d
    return Flops(
        tokens=2 * n * (model.layers * block + outside),
        text=2 * text * (model.layers * 2 * d * d + model.text_dim * d + d * d),
        cross=model.layers * 4 * n * text * d,
        attention=model.layers * 4 * n * n * d,
    )


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
    program: Program, mesh: Mesh, chip: Chip, *, attention_flops: float, model_flops: float
) -> tuple[Roofline, list[Collective]]:
    """The roofline of a compiled step, and its collectives.

    Args:
      attention_flops: that one device runs inside hand-written kernels in a step, recomputation included.
      model_flops: of the whole step on all devices, without recomputation.
    """
    found = program.collectives(dict(mesh.shape))
    network: dict[str, float] = {}
    for collective in found:
        if collective.axes:
            name = "+".join(collective.axes)
            network[name] = network.get(name, 0.0) + collective.bytes / axis_bandwidth(
                mesh, collective.axes, chip
            )
    return Roofline(
        matmul=program.matmul_flops() / chip.flops,
        attention=attention_flops / (chip.flops * chip.attention),
        hbm=program.hbm_bytes() / chip.bandwidth,
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
