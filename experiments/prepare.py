"""Fits the latent codec of a data set on its training clips and prints its reconstruction on held-out ones.

python -m experiments.prepare --config=experiments/configs/tiny.py:codec
"""

import time

import jax
import numpy as np

from experiments import common
from experiments.configs.schema import PrepareConfig
from lingbot_jax.data.loader import evaluation_batches
from lingbot_jax.evaluation.video import clip_psnr
from lingbot_jax.models.codec import fit_linear, save_linear, to_float, to_uint8

CONFIG = common.define_config()


def main() -> None:
    config = common.load(CONFIG, PrepareConfig)
    start = time.monotonic()
    training = evaluation_batches(config.data, "train", config.clips)
    codec = fit_linear((to_float(batch["frames"]) for batch in training), config.codec)
    save_linear(codec, config.out)
    print(f"fitted {config.codec.channels} channels in {time.monotonic() - start:.1f} s: {config.out}")

    reconstruct = jax.jit(lambda frames: to_uint8(codec.decode(codec.encode(to_float(frames)))))
    held_out = evaluation_batches(config.data, clips=config.held_out)
    psnr = np.concatenate([clip_psnr(b["frames"], np.asarray(reconstruct(b["frames"]))) for b in held_out])
    print(f"reconstruction of {len(psnr)} held-out clips: PSNR {psnr.mean():.2f} dB")


if __name__ == "__main__":
    common.run(main)
