"""The first frame of a world: reading an image file, and fitting it to a video size as published."""

import io
import math
import pathlib

import cv2
import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from lingbot_jax.config import ConfigError, require
from lingbot_jax.control import poses

MAX_PIXELS = 64_000_000  # of an input image: far above any use, far below what would exhaust memory
PRESETS = {"480p": 480 * 832, "720p": 720 * 1280}  # area in pixels; the orientation follows the image


def read_image(path: str | pathlib.Path, field: str = "image") -> UInt8[np.ndarray, "h w 3"]:
    """Reads an image of any common format, turned upright as its EXIF says; transparency is dropped.

    Raises:
      ConfigError: no such file, not an image, damaged, or more than MAX_PIXELS.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ConfigError(f"{field} = {str(path)!r}: no such file")
    return decode_image(path, f"{field} = {str(path)!r}", MAX_PIXELS)


def decode_image(file: pathlib.Path | io.BytesIO, where: str, max_pixels: int) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of an image file that nobody vouches for.

    Args:
      where: what errors begin with.

    Raises:
      ConfigError: not an image, damaged, or more than `max_pixels`: told by its header, before anything is unpacked.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
            if width * height > max_pixels:
                limit = f"{max_pixels / 1e6:.3g} megapixels"
                raise ConfigError(f"{where}: {width}x{height} is more than {limit}; make it smaller")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError):
        raise ConfigError(f"{where}: not an image (PNG, JPEG, WebP... expected)") from None
    except ConfigError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        raise ConfigError(f"{where}: a damaged image ({error})") from None


def fit(height: int, width: int, area: int, multiple: int) -> tuple[int, int]:
    """Height and width of about `area` pixels with the image's aspect, multiples of `multiple`.

    The published rule: 480p and 720p are areas, and a portrait image gives a portrait video.
    """
    sides = (math.sqrt(area * height / width), math.sqrt(area * width / height))
    fitted = tuple(int(side // multiple) * multiple for side in sides)
    require(min(fitted) > 0, "image", f"{width}x{height}", f"too narrow for a video of {area} pixels")
    return fitted


def video_size(height: int, width: int, size: str, multiple: int) -> tuple[int, int]:
    """Height and width of the video of an image.

    Args:
      size: a name of PRESETS, or `image`: its own size, rounded down. multiple: of the sides, in pixels.

    Raises:
      ConfigError: an unknown size, or an image that is too small or too narrow.
    """
    if size == "image":
        fitted = (height // multiple * multiple, width // multiple * multiple)
        require(min(fitted) > 0, "image", f"{width}x{height}", f"must be at least {multiple}x{multiple}")
        return fitted
    require(size in PRESETS, "size", size, f"must be image, {', '.join(PRESETS)}")
    return fit(height, width, PRESETS[size], multiple)


def cover(
    image: UInt8[np.ndarray, "h w 3"],
    size: tuple[int, int],
    intrinsics: Shaped[np.ndarray, "f 4"] | None = None,
) -> tuple[UInt8[np.ndarray, "H W 3"], Shaped[np.ndarray, "f 4"] | None]:
    """The image scaled until it covers `size` (height, width) and cut to it about the centre; intrinsics follow."""
    stored = image.shape[:2]
    if stored == tuple(size):
        return image, intrinsics
    scale = max(wanted / have for wanted, have in zip(size, stored, strict=True))
    height, width = (max(round(have * scale), wanted) for wanted, have in zip(size, stored, strict=True))
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    scaled = cv2.resize(image, (width, height), interpolation=method)
    if intrinsics is not None:
        intrinsics = poses.transform_intrinsics(intrinsics, (height, width), base=stored) - [0, 0, left, top]
    return scaled[top : top + size[0], left : left + size[1]], intrinsics


def resize(image: UInt8[np.ndarray, "h w 3"], height: int, width: int) -> Float[np.ndarray, "H W 3"]:
    """The image scaled to [-1, 1] and resized bicubically (a = -0.75, no antialiasing), as published.

    Bicubic weights overshoot: values may pass 1 a little, and the published pipeline does not clip them.
    """
    x = image.astype(np.float32) / 127.5 - 1.0
    if image.shape[:2] == (height, width):
        return x
    return cv2.resize(x, (width, height), interpolation=cv2.INTER_CUBIC)
