"""The manifest of a bundle: the hash of every file that describes it, and the pictures that play starts from.

    manifest.json    {"files": {path: SHA-256}, "fps": 16.0, "pictures": [{"file", "prompt", "intrinsics"}]}
    pictures/00.png  8-bit RGB, all of one size

Arrays have digests and a seal of their own (`worlds.storage`); the manifest holds the hash of each seal, so that a
changed byte, and a part of another bundle, is found wherever it lies. It is optional: a codec alone has none.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping
from typing import Annotated

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image
from pydantic import Field

from lingbot_jax import files
from lingbot_jax.config import ConfigError, Number, Text, build, config, require
from lingbot_jax.worlds.checksums import SEAL

MANIFEST = "manifest.json"
PICTURES = "pictures"
MAX_PICTURES = 100
Relative = Annotated[
    str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*){0,3}$", max_length=200)
]  # no way out of the folder


Intrinsics = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Starts:
    """What play can start from. `pictures`: image, prompt and intrinsics of each. fps: of the training data."""

    pictures: tuple[tuple[UInt8[np.ndarray, "h w 3"], str, Intrinsics | None], ...] = ()
    fps: float | None = None


@config
class Picture:
    """A picture to start from, as the manifest lists it."""

    file: Annotated[str, Field(pattern=rf"^{PICTURES}/\d\d\.png$")] = Field(description="in the bundle")
    prompt: Text = Field("", description="what the world is told that it shows")
    intrinsics: tuple[Number, Number, Number, Number] | None = Field(
        None, description="fx, fy, cx, cy in pixels of the picture; None: from the field of view"
    )


@config
class Manifest:
    """See the module."""

    files: dict[Relative, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = Field(
        description="SHA-256 by path in the bundle"
    )
    fps: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | None = Field(
        None, description="video frames per second that the world was trained at; None: not known"
    )
    pictures: Annotated[tuple[Picture, ...], Field(max_length=MAX_PICTURES)] = Field(
        (), description="to start from"
    )

    def __post_init__(self):
        for picture in self.pictures:
            require(picture.file in self.files, "pictures", picture.file, "has no hash among files")


def write(
    folder: epath.Path,
    described: Mapping[str, bytes],
    starts: Starts = Starts(),  # noqa: B008 - frozen
) -> None:
    """Adds pictures and manifest to a bundle that has its arrays already.

    Args:
      described: other files that the manifest vouches for, by path: with the content that they will have.
    """
    listed, hashed = [], {path: hashlib.sha256(content).hexdigest() for path, content in described.items()}
    for number, (image, prompt, intrinsics) in enumerate(starts.pictures):
        (folder / PICTURES).mkdir(exist_ok=True)
        name, content = f"{PICTURES}/{number:02d}.png", io.BytesIO()
        Image.fromarray(image).save(content, "PNG", optimize=True)
        (folder / name).write_bytes(content.getvalue())
        hashed[name] = hashlib.sha256(content.getvalue()).hexdigest()
        listed.append({"file": name, "prompt": prompt, "intrinsics": intrinsics and list(intrinsics)})
    for seal in sorted((folder / "params").glob(f"*/{SEAL}")):
        hashed[f"params/{seal.parent.name}/{SEAL}"] = hashlib.sha256(seal.read_bytes()).hexdigest()
    values = {"files": hashed, "fps": starts.fps, "pictures": listed}
    build(Manifest, values, MANIFEST)
    (folder / MANIFEST).write_text(json.dumps(values, indent=1) + "\n")


def read(folder: epath.Path, field: str = "run") -> Manifest | None:
    """The manifest of a bundle, after every file in it was compared with its hash; None: it has none.

    Raises:
      ConfigError: a file is gone or was changed after writing, or the manifest is damaged.
    """
    if not (folder / MANIFEST).exists():
        return None
    manifest = build(Manifest, files.read_json(folder / MANIFEST, field), f"{folder / MANIFEST}")
    for path, expected in manifest.files.items():
        file = folder / path
        there = file.exists()
        if not there or hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            what = "was changed after writing, or is of another bundle" if there else "is gone"
            raise ConfigError(f"{field} = {str(folder)!r}: {path} {what}; copy or convert the bundle again")
    return manifest


def image(folder: epath.Path, picture: Picture) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of a picture. Raises ConfigError: not an image."""
    try:
        with Image.open(io.BytesIO((folder / picture.file).read_bytes())) as opened:
            return np.asarray(opened.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{folder / picture.file}: a damaged image ({error})") from None
