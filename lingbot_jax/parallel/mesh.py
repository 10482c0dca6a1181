"""The device mesh: `data` x `fsdp` x `seq` (paper section 3.3.3).

    data   replicas of the model; across slices its steps travel over the data-centre network
    fsdp   parameters, optimiser state and the batch (ZeRO-3)
    seq    tokens of one sample (Ulysses, ring), and parameters again: they are sharded over fsdp x seq

`seq` is the innermost axis, so the devices that exchange activations in every layer are neighbours. A mesh on which
parameters are whole on every device has a fourth axis, `whole`, of one device: `sharding` reads its column of the
table off the mesh, as traced code does everything else.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from pydantic import Field

from lingbot_jax.config import config, require

DATA, FSDP, SEQ, WHOLE = "data", "fsdp", "seq", "whole"
MESH_AXES = (DATA, FSDP, SEQ)
BATCH_AXES = (DATA, FSDP)  # the batch dimension is split over both


AxisSize = Annotated[int, Field(ge=-1, le=2**20)]


@config
class MeshConfig:
    """Sizes of the mesh axes; at most one is -1, "the rest of the devices"."""

    data: AxisSize = Field(1, description="replicas; with several slices a multiple of their number")
    fsdp: AxisSize = Field(-1, description="devices that share parameters, optimiser state and the batch")
    seq: AxisSize = Field(1, description="devices that share the tokens of a sample")
    ulysses: AxisSize = Field(
        -1,
        description="devices of seq that exchange heads for tokens, the rest is a ring; -1: as many as divide",
    )
    weights: Literal["split", "whole"] = Field(
        "split",
        description="parameters split over fsdp x seq and gathered where they are used, or whole on every device: "
        "more memory, and nothing to wait for",
    )

    def __post_init__(self):
        for name in (*MESH_AXES, "ulysses"):
            require(getattr(self, name) != 0, name, 0, "must be positive, or -1 for the rest")
        require(self.sizes.count(-1) <= 1, "fsdp", self.sizes, "only one of data, fsdp, seq may be -1")

    @property
    def sizes(self) -> tuple[int, int, int]:
        return (self.data, self.fsdp, self.seq)

    def resolve(self, devices: int) -> "MeshConfig":
        """Replaces -1 so that the product is `devices`.

        Raises:
          ConfigError: the product of the sizes is not, or does not divide, the number of devices.
        """
        known = math.prod(s for s in self.sizes if s != -1)
        if -1 not in self.sizes:
            require(
                known == devices,
                "config.mesh",
                self.sizes,
                f"product {known} must equal the {devices} devices",
            )
            return self
        require(
            devices % known == 0,
            "config.mesh",
            self.sizes,
            f"product {known} must divide the {devices} devices",
        )
        data, fsdp, seq = (devices // known if s == -1 else s for s in self.sizes)
        return dataclasses.replace(self, data=data, fsdp=fsdp, seq=seq)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `devices` (default: all), laid out for the network that connects them.

    Devices of several slices (they carry `slice_index`) are joined along `data` only: everything that
    happens inside a layer stays within a slice.

    Raises:
      ConfigError: sizes that do not fit the devices, or `data` not a multiple of the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    config = config.resolve(len(devices))
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    if devices[0].platform != "tpu":
        grid = np.array(devices).reshape(config.sizes)
    else:
        count = len(slices)
        require(
            config.data % count == 0, "config.mesh.data", config.data, f"must be a multiple of {count} slices"
        )
        sizes = (config.data // count, config.fsdp, config.seq)
        grid = np.concatenate([arrange(slices[index], sizes) for index in sorted(slices)])
    axes = MESH_AXES if config.weights == "split" else (*MESH_AXES, WHOLE)
    return Mesh(
        grid.reshape(*grid.shape, *[1] * (len(axes) - 3)), axes, axis_types=(AxisType.Auto,) * len(axes)
    )


def arrange(devices: list[Any], sizes: tuple[int, int, int]) -> np.ndarray:
    """The devices of one slice, [data fsdp seq]: seq takes the chips of a host first, then neighbouring hosts.

    JAX's own choice would lay seq along a whole dimension of the torus where one is as long, through half of each
    host it meets: hosts would share samples in fours, and several would have to load the same ones.
    """
    places = np.array([(*device.coords, getattr(device, "core_on_chip", 0)) for device in devices])
    places -= places.min(0)
    hosts = np.array([device.process_index for device in devices])
    host = np.ptp(places[hosts == hosts[0]], 0) + 1  # shape of a host's part of the torus
    extent = places.max(0) + 1
    corners = {tuple(x) for x in np.column_stack([hosts, *(places // host).T])}
    if math.prod(extent) != len(devices) or len(corners) * math.prod(host) != len(devices):
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)

    # Coordinates as digits: cores and chips of a host, then hosts along x, y, z, short dimensions first.
    digits = [[places[:, d] % host[d], host[d]] for d in (3, 0, 1, 2)]
    digits += [
        [places[:, d] // host[d], extent[d] // host[d]] for d in np.argsort(extent // host, kind="stable")
    ]
    index, stride = np.zeros(len(devices), int), 1
    for size in reversed(sizes):
        for digit in digits:
            taken = math.gcd(size, int(digit[1]))
            index += digit[0] % taken * stride
            stride, size = stride * taken, size // taken
            digit[:] = digit[0] // taken, digit[1] // taken
    grid = np.empty(len(devices), object)
    grid[index] = devices
    return grid.reshape(sizes)
