"""Measures a world on held-out clips: against the truth, with another clip's keys, and by how it follows actions.

Every clip is generated from its true first frame, once with its own keys and camera path and once with those of
another clip: the difference of the two is what the keys are worth. `evaluate_world` is used by `experiments.evaluate`
and, through `make_validation`, by the training loop.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jaxtyping import UInt8

from lingbot_jax.config import require
from lingbot_jax.data.config import DataConfig
from lingbot_jax.data.crops import crops, resize_crops
from lingbot_jax.evaluation.action_following import yaw_signs
from lingbot_jax.evaluation.video import clip_psnr, frame_psnr
from lingbot_jax.models.codec import to_float, to_uint8
from lingbot_jax.rollout.sample import pad_rows, sample_clips
from lingbot_jax.training import curriculum
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.worlds.clips import prepare
from lingbot_jax.worlds.config import SampleConfig
from lingbot_jax.worlds.world import World

Rows = dict[str, np.ndarray]  # clips as the data gives them: frames, keys, c2w, intrinsics, captions
Videos = UInt8[np.ndarray, "n f H W 3"]
SHOWN = 4  # clips in the video of a validation


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
      numbers: PSNR in dB over the generated frames, shares in [0, 1], counts, frames per second.
      by_frame: PSNR in dB of every generated frame, mean over clips.
      videos: truth, true_keys, other_keys.
    """

    numbers: dict[str, float]
    by_frame: dict[str, list[float]]
    videos: dict[str, Videos]


def held_out_clips(
    config: DataConfig,
    count: int,
    size: tuple[int, int] = (0, 0),
    split: str = "held_out",
    field: str = "config.clips",
) -> Rows:
    """The first clips of a split in which a key is pressed: a camera at rest is no test of a world model.

    Args:
      size: height and width that they are scaled and cropped to, as in training; (0, 0): as stored.
      field: the flag that `count` is from, for errors.

    Raises:
      ConfigError: not as many. DataError: no data there, or damage.
    """
    found: dict[str, list] = {}
    for batch in crops(config, split):
        moving = batch["keys"][:, 1:].any(axis=(1, 2))
        kept = resize_crops({name: values[moving] for name, values in batch.items()}, size)
        for name, values in kept.items():
            found.setdefault(name, []).extend(values)
        if len(found["keys"]) >= count:
            break
    have = len(found.get("keys", []))
    what = f"{config.path} has {have} {split.replace('_', '-')} clips of {config.frames} frames with movement"
    require(have >= count, field, count, what)
    return {name: np.array(values[:count]) for name, values in found.items()}


def check_size(world: World, clips: Rows, field: str = "config.data.size") -> None:
    """Raises ConfigError unless the clips are of a size and length that the world has."""
    config, stride = world.config, world.config.codec.stride[0]
    frames, height, width = clips["frames"].shape[1:4]
    tokens = [config.network.spatial_stride * p for p in config.network.patch[1:]]
    fits = height % tokens[0] == 0 and width % tokens[1] == 0
    require(fits, field, (height, width), f"must be multiples of {tuple(tokens)} pixels")
    require(frames % stride == 1 % stride, "config.data.frames", frames, f"must be {stride}n + 1")


def evaluate_world(
    world: World,
    clips: Rows,
    sample: SampleConfig | None = None,
    *,
    batch: int = 32,
    seed: int = 0,
    track: Callable[[Iterable, str], Iterable] = lambda values, title: values,
) -> Measured:
    """Generates the clips and measures them. On several processes all make the same call.

    Args:
      clips: at least 2 (`held_out_clips`). sample: None: as the world samples. batch: clips generated at a time.
      seed: of the noise; that of a clip does not depend on the batch it is in.
      track: wraps the batches of a pass, as rich.progress.track does.

    Raises:
      ConfigError: a world that does not sample whole clips, or clips that it has not the size for.
    """
    check_size(world, clips)
    truth, count = clips["frames"], len(clips["frames"])
    require(count >= 2, "config.clips", count, "must be at least 2: one lends its keys to another")
    batch = min(batch, count)

    def generate(order: np.ndarray, title: str) -> Videos:
        """Videos from each clip's first frame, with the keys and the camera path of clip order[i]."""
        videos = []
        for start in track(range(0, count, batch), title):
            own = np.arange(start, min(start + batch, count))
            rows = {name: clips[name][order[own]] for name in ("keys", "c2w", "intrinsics")}
            rows |= {"frames": truth[own], "captions": clips[world.config.caption][own], "index": own}
            rows = pad_rows(rows, batch)  # so that the last batch runs the same program
            prepared = prepare(
                world.config, world.text, rows, np.ones(batch, np.int32), captions=rows["captions"]
            )
            video = sample_clips(world, prepared, sample, seed=seed, indices=rows["index"].tolist())
            videos.append(np.asarray(to_uint8(video))[: len(own)])
        return np.concatenate(videos)

    own = np.arange(count)
    generated = generate(own, "true keys ")  # this pass compiles
    began = time.monotonic()
    other = generate(np.roll(own, 1), "other keys")
    seconds = time.monotonic() - began
    frozen = np.repeat(truth[:, :1], truth.shape[1], axis=1)
    codec_only = np.concatenate([reconstruct(world, truth[i : i + 1]) for i in range(count)])

    # Frame 0 is given: only generated frames count.
    score = lambda videos: float(clip_psnr(videos[:, 1:], truth[:, 1:]).mean())
    signs = {
        name: np.sum([yaw_signs(v, k) for v, k in zip(videos, clips["keys"], strict=True)], axis=0)
        for name, videos in (("generated", generated), ("truth", truth))
    }
    share = lambda pair: float(pair[0] / max(pair[1], 1))
    numbers = {
        "clips": count,
        "generated_frames": truth.shape[1] - 1,
        "height": truth.shape[2],
        "width": truth.shape[3],
        "psnr_true_keys": score(generated),
        "psnr_other_keys": score(other),
        "psnr_frozen": score(frozen),
        "codec_psnr": score(codec_only),
        "yaw_sign_agreement": share(signs["generated"]),
        "yaw_sign_agreement_truth": share(signs["truth"]),
        "yaw_spans": int(signs["generated"][1]),
        "frames_per_second": (truth.shape[1] - 1) * count / seconds,
    }
    videos = {"true_keys": generated, "other_keys": other, "frozen": frozen}
    by_frame = {n: frame_psnr(v, truth)[:, 1:].mean(axis=0).tolist() for n, v in videos.items()}
    return Measured(numbers, by_frame, {"truth": truth, "true_keys": generated, "other_keys": other})


def reconstruct(world: World, frames: Videos) -> Videos:
    """Videos through the world's codec and back."""
    with jax.set_mesh(world.mesh):
        return np.asarray(_reconstruct(world.codec, frames))


_reconstruct = jax.jit(lambda codec, frames: to_uint8(codec.decode(codec.encode(to_float(frames)))))


def side_by_side(videos: Iterable[Videos], gap: int = 4) -> UInt8[np.ndarray, "f H W 3"]:
    """Columns of videos, one row per clip, with white lines between them."""
    lines = ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0))
    columns = [np.concatenate(list(np.pad(v, lines, constant_values=255)), axis=1) for v in videos]
    return np.concatenate(columns, axis=2)


def make_validation(
    config: TrainConfig,
) -> Callable[[World, int], tuple[dict[str, float], dict[str, np.ndarray]]] | None:
    """The value that the training loop calls as `evaluate(world, step)`, for the data of the step's phase.

    Returns:
      a function that gives numbers for the metrics and videos for TensorBoard (truth, true keys, other keys side by
      side); None where the run does not ask for it.
    """
    if not config.validation.every:
        return None

    @functools.cache
    def clips_of(phase: int) -> Rows:
        own = config.phases()[phase]
        return held_out_clips(own.data, config.validation.clips, own.size, field="config.validation.clips")

    def evaluate(world: World, step: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        clips = clips_of(curriculum.phase_at(config, step - 1))
        measured = evaluate_world(world, clips, batch=config.validation.clips)
        shown = [measured.videos[name][:SHOWN] for name in ("truth", "true_keys", "other_keys")]
        return measured.numbers, {"truth, true keys, other keys": side_by_side(shown)}

    clips_of(curriculum.phase_at(config, 0))  # what is missing is found before the first step
    return evaluate
