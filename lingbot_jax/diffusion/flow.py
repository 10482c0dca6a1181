"""Flow matching on a straight path between a clean latent x0 and Gaussian noise n (paper section 3.3.1).

    x_s = (1 - s) x0 + s n,     v = d x_s / d s = n - x0,     s in [0, 1] the noise level (sigma).

Networks see the timestep t = 1000 s. A level may differ per latent frame: sigma is `b t`, or any prefix
of the latent's shape.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

Array = jax.Array | np.ndarray  # host tables and device arrays go through the same formulas
TIMESTEPS = 1000.0  # timestep = TIMESTEPS * sigma, the scale every published network was trained on


def over(sigma: Float[Array, "..."] | float, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Appends unit axes so that `sigma`, a prefix of x's shape (`b`, `b t`), broadcasts over `x`."""
    sigma = jnp.asarray(sigma)
    if sigma.ndim > x.ndim or any(
        s not in (1, n) for s, n in zip(sigma.shape, x.shape[: sigma.ndim], strict=True)
    ):
        raise ValueError(f"sigma {sigma.shape} must be a prefix of the latent's shape {x.shape}")
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


def shift_sigma(u: Float[Array, "..."] | float, shift: float | jax.Array) -> Float[Array, "..."] | float:
    """The timestep shift s = shift u / (1 + (shift - 1) u): more noise for longer or larger videos."""
    return shift * u / (1.0 + (shift - 1.0) * u)


def unshift_sigma(
    sigma: Float[Array, "..."] | float, shift: float | jax.Array
) -> Float[Array, "..."] | float:
    """The inverse of `shift_sigma`."""
    return sigma / (shift - (shift - 1.0) * sigma)


def sample_sigma(
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    shift: float | jax.Array,
    region: tuple[float | jax.Array, float | jax.Array] = (0.0, 1.0),
) -> Float[Array, "..."]:
    """Draws noise levels: u uniform, shifted, and conditioned on lying in `region` (sigma units).

    An expert trains on its own region only: (boundary, 1) or (0, boundary). Because the shift is monotone,
    conditioning s on [lo, hi] is drawing u uniformly between the two pre-images: no rejection.

    Args:
      shape: one level per element; `(b, 1)` for a level shared by the frames of a sample.
      shift: > 0; 1 is uniform. A Python number or an array (the curriculum changes it without recompiling).
      region: (lo, hi), 0 <= lo < hi <= 1; numbers or arrays.
    """
    lo, hi = region
    if not isinstance(lo, jax.Array) and not isinstance(hi, jax.Array) and not 0.0 <= lo < hi <= 1.0:
        raise ValueError(f"region = {region}: must be 0 <= lo < hi <= 1 in sigma units")
    u_lo, u_hi = unshift_sigma(lo, shift), unshift_sigma(hi, shift)
    u = u_lo + (u_hi - u_lo) * jax.random.uniform(key, shape)
    # Rounding of shift_sigma(unshift_sigma(.)) may leave the region by one ulp; routing compares with the boundary.
    return jnp.clip(shift_sigma(u, shift), lo, hi)


def add_noise(
    x0: Float[Array, "b t *rest"], noise: Float[Array, "b t *rest"], sigma: Float[Array, "..."] | float
) -> Float[Array, "b t *rest"]:
    """x_s = (1 - s) x0 + s n."""
    s = over(sigma, x0)
    return (1.0 - s) * x0 + s * noise


def velocity_target(x0: Float[Array, "..."], noise: Float[Array, "..."]) -> Float[Array, "..."]:
    """What the network predicts: v = n - x0, at every noise level."""
    return noise - x0


def x0_from_velocity(
    x: Float[Array, "b t *rest"], velocity: Float[Array, "b t *rest"], sigma: Float[Array, "..."] | float
) -> Float[Array, "b t *rest"]:
    """The clean latent that a velocity at noise level sigma implies: x0 = x_s - s v."""
    return x - over(sigma, x) * velocity
