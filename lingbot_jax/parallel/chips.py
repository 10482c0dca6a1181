"""What the chips of TPU generations can do."""

import dataclasses

import jax

from lingbot_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a TPU generation.

    Attributes:
      kinds: JAX's names of it (`device.device_kind`). flops: peak bf16 FLOP/s. hbm: bytes; bandwidth: bytes/s.
      link: bytes/s one way of one ICI link.
      torus: links a ring closes over: a dimension of this many chips (or a multiple) wraps around.
      attention: fraction of peak at which the attention kernels run at head_dim 128, waits for HBM not counted.
      dcn: bytes/s per chip over the data-centre network.
    """

    kinds: tuple[str, ...]
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
# fmt: off
CHIPS = {
    "v5e": Chip(("TPU v5 lite", "TPU v5e"),
                flops=197e12, hbm=16e9, bandwidth=819e9, link=4.5e10, torus=16, attention=0.97),
    "v5p": Chip(("TPU v5", "TPU v5p"),
                flops=459e12, hbm=95e9, bandwidth=2765e9, link=9e10, torus=4, attention=0.97),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"),
                flops=918e12, hbm=32e9, bandwidth=1640e9, link=9e10, torus=16, attention=0.60),
    "tpu7x": Chip(("TPU7x",),
                  flops=1153.5e12, hbm=96e9, bandwidth=3690e9, link=5e10, torus=4, attention=0.63),
}
# fmt: on


def chip(topology: str) -> Chip:
    """The chip of a topology name such as `v5p:8x8x4`. Raises ConfigError for another generation."""
    generation = topology.partition(":")[0]
    if generation not in CHIPS:
        raise ConfigError(
            f"topology = {topology!r}: generation {generation!r} is not one of {', '.join(CHIPS)}"
        )
    return CHIPS[generation]


def chip_of(device: jax.Device) -> Chip | None:
    """The chip that a device is; None for what is not in the table (a CPU, a GPU, another generation)."""
    return next((chip for chip in CHIPS.values() if device.device_kind in chip.kinds), None)
