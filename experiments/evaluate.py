"""Generates held-out clips and measures them: against the truth, with another clip's keys, and by obedience.

python -m experiments.evaluate --config=experiments/configs/tiny.py:evaluate

Writes a folder: evaluation.json, sheet.png, and generated.mp4 (truth, generated, and the same world under
other keys, side by side).
"""

import dataclasses
import json
import pathlib
import time

import numpy as np
from rich.progress import track

from experiments import common
from experiments.configs.schema import EvaluateConfig
from experiments.worlds import open_world
from lingbot_jax.config import ConfigError
from lingbot_jax.data.loader import evaluation_batches
from lingbot_jax.data.video import contact_sheet, write_image, write_mp4
from lingbot_jax.evaluation.control import yaw_signs
from lingbot_jax.evaluation.video import clip_psnr, frame_psnr
from lingbot_jax.models.codec import to_float, to_uint8
from lingbot_jax.rollout.bidirectional import sample_clips
from lingbot_jax.training.checkpoints import load_config
from lingbot_jax.training.encode import ClipEncoder

CONFIG = common.define_config()


def moving_clips(config: EvaluateConfig, loader) -> dict[str, np.ndarray]:
    """The first held-out clips in which a key is pressed: a camera at rest is no test of a world model."""
    found: dict[str, list] = {}
    for batch in evaluation_batches(dataclasses.replace(loader, frames=config.frames)):
        moving = batch["keys"][:, 1:].any(axis=(1, 2))
        for name, values in batch.items():
            found.setdefault(name, []).extend(values[moving])
        if len(found["keys"]) >= config.clips:
            break
    count = len(found.get("keys", []))
    if count < config.clips:
        raise ConfigError(
            f"clips = {config.clips}: data {loader.path} has {count} held-out clips with movement"
        )
    return {name: np.array(values[: config.clips]) for name, values in found.items()}


def main() -> None:
    config = common.load(CONFIG, EvaluateConfig)
    run = load_config(config.run)
    world = open_world(config.run)
    codec = world.codec
    encoder = ClipEncoder(codec, world.text_encoder, world.config, world.pose)
    clips = moving_clips(config, run.data)
    truth = clips["frames"]

    def generate(order: np.ndarray, title: str) -> np.ndarray:
        """Videos from each clip's first frame, with the keys and the camera path of clip order[i]."""
        videos = []
        for start in track(range(0, config.clips, config.batch), description=title):
            rows = np.arange(start, min(start + config.batch, config.clips))
            window = {name: clips[name][order[rows]] for name in ("keys", "c2w", "intrinsics")}
            window["frames"] = truth[rows]
            condition = encoder.condition(
                window, clips[run.tasks.caption][rows], np.ones(len(rows), np.int32)
            )
            video = sample_clips(
                world.model,
                codec,
                world.text_encoder,
                condition,
                config.sample,
                seed=config.seed,
                indices=rows,
            )
            videos.append(np.asarray(to_uint8(video)))
        return np.concatenate(videos)

    own = np.arange(config.clips)
    began = time.monotonic()
    generated = generate(own, "true keys ")
    seconds = time.monotonic() - began
    other = generate(np.roll(own, 1), "other keys")
    frozen = np.repeat(truth[:, :1], truth.shape[1], axis=1)
    codec_only = np.concatenate(
        [np.asarray(to_uint8(codec.decode(codec.encode(to_float(x[None]))))) for x in truth]
    )

    # Frame 0 is given: only generated frames count.
    score = lambda videos: float(clip_psnr(videos[:, 1:], truth[:, 1:]).mean())
    signs = {
        name: np.sum([yaw_signs(v, k) for v, k in zip(videos, clips["keys"], strict=True)], axis=0)
        for name, videos in (("generated", generated), ("truth", truth))
    }
    results = {
        "clips": config.clips,
        "generated_frames": config.frames - 1,
        "psnr_true_keys": score(generated),
        "psnr_other_keys": score(other),
        "psnr_frozen": score(frozen),
        "codec_psnr": score(codec_only),
        "yaw_sign_agreement": _share(signs["generated"]),
        "yaw_sign_agreement_truth": _share(signs["truth"]),
        "yaw_spans": int(signs["generated"][1]),
        "frames_per_second": (config.frames - 1) * config.clips / seconds,
        "psnr_by_frame": {
            name: frame_psnr(videos, truth)[:, 1:].mean(axis=0).tolist()
            for name, videos in (("true_keys", generated), ("other_keys", other), ("frozen", frozen))
        },
    }
    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        row
        for i in range(config.shown)
        for row in ((f"{i} truth", truth[i]), (f"{i} true keys", generated[i]), (f"{i} other keys", other[i]))
    ]
    write_image(out / "sheet.png", contact_sheet(rows, columns=9))
    write_mp4(
        out / "generated.mp4", _side_by_side([v[: config.shown] for v in (truth, generated, other)]), 8.0, 3
    )
    (out / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps({name: value for name, value in results.items() if name != "psnr_by_frame"}, indent=2))


def _share(signs: np.ndarray) -> float:
    return float(signs[0] / max(signs[1], 1))


def _side_by_side(videos: list[np.ndarray], gap: int = 4) -> np.ndarray:
    """Columns of videos `[n f h w 3]`, a row each clip, with white lines between them."""
    padded = [np.pad(v, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255) for v in videos]
    columns = [np.concatenate(list(v), axis=1) for v in padded]
    return np.concatenate(columns, axis=2)


if __name__ == "__main__":
    common.run(main)
