"""Rotary position embedding over (time, height, width), and exact angles.

The published code computes angles in float64. `cos_sin` reaches float32-rounded float64 without float64 on
the device: angles of whole positions come from NumPy tables, gathered by index, and are added by the
addition theorems. A plain float32 angle near position 1000 is off by 6e-5 rad.

Order of head dimensions: the published rotary pairs are neighbours (2i, 2i + 1). Here the first members of
all pairs come first, then all second members, so that a rotation needs two contiguous halves instead of
stride-2 access (slow on CPUs, a lane shuffle on TPUs). Scores do not change when q and k are permuted alike.
The conversion tables permute the columns of q and k and their norms' scales; `interleave` restores the published
order of cached keys. The pairs of the time axis come first, then height, then width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

FINE = 1024  # rows of the table of units
COARSE = 64  # rows of the table of FINE units: positions below 65,536, more than four hours of video
POSITIONS = FINE * COARSE

Rotary = tuple[Float32[Array, "*n r"], Float32[Array, "*n r"]]  # cosines and sines, r = head_dim / 2


def _table(rows: np.ndarray, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    angles = np.outer(rows, frequencies)
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def _add(a: Rotary, b: Rotary) -> Rotary:
    """cos and sin of the sum of two angles."""
    return a[0] * b[0] - a[1] * b[1], a[1] * b[0] + a[0] * b[1]


def cos_sin(position: Float[Array, "*n"] | Int[Array, "*n"], frequencies: np.ndarray) -> Rotary:
    """cos and sin of position * frequency, to float32 rounding, for positions in [0, 65536).

    Args:
      position: whole or fractional, may be traced.
      frequencies: float64 [r] in (0, 1], radians a unit.
    """
    whole = jnp.floor(position).astype(jnp.int32)
    fine, coarse = whole % FINE, whole // FINE
    cos, sin = _table(np.arange(FINE), frequencies)
    high_cos, high_sin = _table(np.arange(COARSE) * FINE, frequencies)
    angle = _add((cos[fine], sin[fine]), (high_cos[coarse], high_sin[coarse]))
    if jnp.issubdtype(position.dtype, jnp.floating):
        rest = (position - whole)[..., None] * jnp.asarray(frequencies, jnp.float32)
        angle = _add(angle, (jnp.cos(rest), jnp.sin(rest)))
    return angle


def _frequencies(size: int, theta: float) -> np.ndarray:
    """Angles a unit of position of an axis that owns `size` head dimensions."""
    return np.power(theta, -np.arange(0, size, 2, dtype=np.float64) / size)


def axis_sizes(head_dim: int) -> tuple[int, int, int]:
    """Head dimensions of time, height and width: 44, 42, 42 of 128."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rotary(
    positions: Int[Array, "t"], height: int, width: int, head_dim: int, theta: float
) -> tuple[Float32[Array, "t p r"], Float32[Array, "t p r"]]:
    """Rotary table of every token of a clip.

    Args:
      positions: latent frame index of each frame, in [0, 65536); may be traced.
      height, width: tokens of a frame, p = height * width.
    """
    time_size, height_size, width_size = axis_sizes(head_dim)
    rows, columns = np.divmod(np.arange(height * width), width)
    frames = len(positions)
    parts = [
        [jnp.broadcast_to(x[:, None], (frames, height * width, x.shape[-1])) for x in angle]
        for angle in [cos_sin(positions, _frequencies(time_size, theta))]
    ]
    for index, size in ((rows, height_size), (columns, width_size)):
        angle = _table(index, _frequencies(size, theta))
        parts.append([jnp.broadcast_to(x, (frames, *x.shape)) for x in angle])
    cos, sin = (jnp.concatenate(x, -1) for x in zip(*parts, strict=True))
    return cos, sin


def rotate(x: Float[Array, "*b h k"], table: Rotary) -> Float[Array, "*b h k"]:
    """Rotates the pairs of each head, in float32; the table `[... k/2]` matches the axes before the heads."""
    cos, sin = (part[..., None, :] for part in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def interleave(x: Float[Array, "*b k"]) -> Float[Array, "*b k"]:
    """Head dimensions from our order (halves) to the published one (neighbouring pairs)."""
    return jnp.stack(jnp.split(x, 2, -1), -1).reshape(x.shape)
