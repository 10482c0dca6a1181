"""How near a generated video is to the recorded one."""

import numpy as np
from jaxtyping import Float, UInt8

Videos = UInt8[np.ndarray, "*b f h w 3"]
_FLOOR = 1e-10  # bounds the PSNR of equal videos at 100 dB


def _psnr(error: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    return -10 * np.log10(np.maximum(error, _FLOOR))


def _squared_error(a: Videos, b: Videos) -> Float[np.ndarray, "*b f"]:
    return np.square((a.astype(np.float32) - b) / 255.0).mean(axis=(-3, -2, -1))


def frame_psnr(a: Videos, b: Videos) -> Float[np.ndarray, "*b f"]:
    """PSNR in dB of each frame of 8-bit videos."""
    return _psnr(_squared_error(a, b))


def clip_psnr(a: Videos, b: Videos) -> Float[np.ndarray, "*b"]:
    """PSNR in dB of each video: of the squared error averaged over its frames."""
    return _psnr(_squared_error(a, b).mean(axis=-1))
