"""Fits the latent codec of a data set on its training clips and prints its reconstruction on held-out ones.

python -m experiments.fit_codec --config=experiments/configs/tiny.py:codec

Writes a bundle that holds a codec and nothing else; training takes it with --config.codec. The folder appears whole
or not at all; where it is there already, and was fitted by the same config, nothing is done.
"""

import dataclasses
import json
import time
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float

from experiments import common
from experiments.configs.schema import FitCodecConfig
from lingbot_jax.data.crops import crops
from lingbot_jax.data.loader import BatchStream, Dataset
from lingbot_jax.evaluation.video import clip_psnr
from lingbot_jax.files import whole_folder
from lingbot_jax.models.codec import LinearCodec, fit_linear, to_float, to_uint8
from lingbot_jax.models.config import LinearCodecConfig
from lingbot_jax.models.conv_codec import ConvCodec, fit_conv
from lingbot_jax.training.codec import train_codec
from lingbot_jax.worlds.open import write_codec

CONFIG = common.define_config(FitCodecConfig)
FITTED = "fit_codec.json"  # beside bundle.json: the config that made it


def main() -> None:
    config = common.load(CONFIG, FitCodecConfig)
    made = json.loads(json.dumps(dataclasses.asdict(config)))
    there = epath.Path(config.out) / FITTED
    if there.exists() and json.loads(there.read_text()) == made:
        print(f"fitted before, by the same config: {config.out}")
        return
    start = time.monotonic()
    with whole_folder(config.out, field="config.out") as folder:
        codec = fit(config)
        write(folder, codec, made)
    print(f"fitted {config.codec.channels} channels in {time.monotonic() - start:.1f} s: {config.out}")

    # The codec as an argument: XLA miscompiles its convolutions on the CPU where their kernels are constants.
    reconstruct = jax.jit(lambda codec, frames: to_uint8(codec.decode(codec.encode(to_float(frames)))))
    held_out = crops(config.data, "held_out", config.held_out)
    psnr = np.concatenate(
        [clip_psnr(b["frames"], np.asarray(reconstruct(codec, b["frames"]))) for b in held_out]
    )
    print(f"reconstruction of {len(psnr)} held-out clips: PSNR {psnr.mean():.2f} dB")


def fit(config: FitCodecConfig) -> LinearCodec | ConvCodec:
    """The codec of the config, on its training clips."""

    def batches() -> Iterator[Float[Array, "b f h w 3"]]:
        return (to_float(batch["frames"]) for batch in crops(config.data, "train", config.clips))

    if isinstance(config.codec, LinearCodecConfig):
        return fit_linear(batches(), config.codec)
    codec = fit_conv(batches, config.codec, jax.random.key(config.seed))
    if not config.steps:
        return codec
    stream = BatchStream(Dataset(config.data, "train"), range(config.data.batch), start=0)
    try:
        frames = (batch["frames"] for batch in stream)
        return train_codec(codec, frames, config.steps, config.learning_rate, config.noise, config.seed)
    finally:
        stream.close()


def write(folder: epath.Path, codec: LinearCodec | ConvCodec, made: dict) -> None:
    """The bundle; bundle.json last, since it marks the folder as one."""
    (folder / FITTED).write_text(json.dumps(made, indent=2) + "\n")
    write_codec(folder, codec)


if __name__ == "__main__":
    common.run(main)
