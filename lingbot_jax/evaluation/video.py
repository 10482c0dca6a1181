"""How near a generated video is to the recorded one."""

import numpy as np
from jaxtyping import Float, UInt8


def frame_psnr(
    a: UInt8[np.ndarray, "*b f h w 3"], b: UInt8[np.ndarray, "*b f h w 3"]
) -> Float[np.ndarray, "*b f"]:
    """PSNR in dB of each frame of 8-bit videos; equal frames give 100."""
    error = np.square(a.astype(np.float64) - b).mean(axis=(-3, -2, -1)) / 255.0**2
    return -10 * np.log10(np.maximum(error, 1e-10))
