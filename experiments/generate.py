"""Generates a video from a trained world: first frame + keys (or recorded poses) + prompt -> MP4.

python -m experiments.generate --run=runs/demo/world --image=door.png --keys=w-20,wl-12 --prompt="a hall" \
    --out=runs/demo/clip

Writes a folder: video.mp4, poses.npy (camera to world, one a frame), and generation.json, whose `command`
makes the same video again. The folder appears when everything in it is complete, or not at all.
"""

import dataclasses
import hashlib
import json
import pathlib
import shlex
import shutil
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console

from experiments import common
from lingbot_jax.config import require
from lingbot_jax.control import keyboard, plucker, poses
from lingbot_jax.data.video import write_mp4
from lingbot_jax.diffusion.guidance import Guidance
from lingbot_jax.models.codec import Codec, load_linear
from lingbot_jax.models.dit import Condition, WorldDiT
from lingbot_jax.models.text import HashedNgramEncoder, TextEncoder
from lingbot_jax.rollout import bidirectional, images
from lingbot_jax.training.checkpoints import load_config, load_ema
from lingbot_jax.training.config import PoseConfig, TrainConfig
from lingbot_jax.training.state import abstract_model, merge

FLAGS = flags.FLAGS
flags.DEFINE_string("run", None, "run directory of experiments.train")
flags.DEFINE_string("image", None, "first frame: an image file")
flags.DEFINE_string("prompt", None, "what the world looks like")
flags.DEFINE_string("negative_prompt", "", "what it must not look like; used where guidance is not 1")
flags.DEFINE_string("keys", None, "keys as <keys>-<frames>,...: w-20,wl-12,none-8 (W A S D I J K L)")
flags.DEFINE_string("camera", None, "folder with poses.npy [f 4 4] and intrinsics.npy [f 4] instead of keys")
flags.DEFINE_string("camera_size", "480x832", "HxW of the image that intrinsics.npy belongs to")
flags.DEFINE_integer("frames", None, "video frames, 4n+1; default: as many as the keys or poses give")
flags.DEFINE_string("size", "image", "480p, 720p (areas; the image's aspect is kept), or image: its own size")
flags.DEFINE_float("walk", keyboard.STEP, "world units a frame of a movement key")
flags.DEFINE_float("turn", keyboard.DEGREES, "degrees a frame of a looking key")
flags.DEFINE_float("fov", 90.0, "horizontal field of view in degrees, with --keys")
flags.DEFINE_integer("steps", 70, "denoising steps")
flags.DEFINE_float("shift", 10.0, "timestep shift; 3 suits 480p with few steps")
flags.DEFINE_list("guidance", ["5", "5"], "guidance scale, or low-noise,high-noise scales; 1 is off")
flags.DEFINE_enum("solver", "unipc", ["unipc", "dpmpp", "euler"], "ODE solver")
flags.DEFINE_integer("seed", 0, "of the noise")
flags.DEFINE_integer("fps", 16, "of the video file")
flags.DEFINE_string("out", None, "folder to write; must not exist yet")


@dataclasses.dataclass(frozen=True)
class World:
    """What a run directory holds, ready to generate."""

    model: WorldDiT
    codec: Codec
    text_encoder: TextEncoder
    config: TrainConfig


def open_run(run: str) -> World:
    """The averaged model of a run directory, with its codec and text encoder. Raises ConfigError."""
    config = load_config(run)
    model = merge(abstract_model(config), load_ema(run))
    text_encoder = HashedNgramEncoder(config.model.text_dim, config.model.text_len)
    return World(model, load_linear(config.codec), text_encoder, config)


@dataclasses.dataclass(frozen=True)
class Path:
    """The camera's path, one row a video frame: poses, intrinsics in pixels of the video, keys."""

    c2w: np.ndarray
    intrinsics: np.ndarray
    keys: np.ndarray

    def cut(self, frames: int) -> "Path":
        return Path(self.c2w[:frames], self.intrinsics[:frames], self.keys[:frames])


def path_from_keys(text: str, height: int, width: int, *, walk: float, turn: float, fov: float) -> Path:
    """Integrates a key text; the intrinsics are a centred pinhole of the given horizontal field of view."""
    require(0 < fov < 180, "fov", fov, "must be between 0 and 180 degrees")
    require(walk > 0, "walk", walk, "must be positive")
    require(turn > 0, "turn", turn, "must be positive")
    keys = keyboard.parse(text)
    c2w = keyboard.integrate(keys, step=walk, yaw_degrees=turn, pitch_degrees=turn)
    focal = width / 2 / np.tan(np.radians(fov) / 2)
    return Path(c2w, np.tile([focal, focal, width / 2, height / 2], (len(keys), 1)), keys)


def path_from_folder(folder: str, base: tuple[int, int], height: int, width: int) -> Path:
    """Recorded poses; keys are read off the motion, with half of the usual displacement as threshold."""
    c2w, intrinsics = poses.load(folder)
    moved = np.linalg.norm(np.diff(c2w[:, :3, 3], axis=0), axis=1)
    usual = float(np.median(moved[moved > 0])) if (moved > 0).any() else keyboard.STEP
    keys = keyboard.keys_from_poses(c2w, move=usual / 2)
    return Path(c2w, poses.transform_intrinsics(intrinsics, (height, width), base=base), keys)


def clip_length(have: int, wanted: int | None, stride: int, *, pad: bool) -> int:
    """Frames of the video: `wanted` if given, else the nearest stride*n + 1 (up with `pad`, else down).

    Raises:
      ConfigError: `wanted` is not of that form, or longer than the path.
    """
    if wanted is not None:
        require(
            wanted > 0 and wanted % stride == 1 % stride,
            "frames",
            wanted,
            f"must be {stride}n + 1, such as {max(wanted - 1, 0) // stride * stride + 1}",
        )
        require(
            pad or wanted <= have, "frames", wanted, f"the poses give {have}; record more, or ask for less"
        )
        return wanted
    steps = (have - 1 + (stride - 1 if pad else 0)) // stride
    return stride * steps + 1


def pad_path(path: Path, frames: int) -> Path:
    """The camera stands still after the end of the path; longer ones are cut."""
    grow = lambda a: np.concatenate([a, np.repeat(a[-1:], max(frames - len(a), 0), axis=0)])[:frames]
    keys = np.concatenate([path.keys, np.zeros((max(frames - len(path.keys), 0), 8), bool)])[:frames]
    return Path(grow(path.c2w), grow(path.intrinsics), keys)


def make_control(path: Path, world: World, height: int, width: int) -> jax.Array | None:
    """Packed control of a clip, `1 t h w p`, with the poses made relative as in the run's training."""
    model, pose, stride = world.config.model, world.config.pose, world.codec.config.stride
    if model.control == "none":
        return None
    relative = relative_poses(path.c2w, pose, world.codec.config.latent_frames(len(path.c2w)))
    held = None
    if model.control != "cam":
        held = plucker.latent_keys(path.keys[:, : len(keyboard.MOVEMENT)], stride[0])
    packed = plucker.control(
        relative, path.intrinsics[:1], held, model.control, height, width, model.spatial_stride
    )
    return jnp.asarray(packed)[None]


def relative_poses(c2w: np.ndarray, pose: PoseConfig, latent_frames: int) -> np.ndarray:
    normalise = "max_norm" if pose.translation == "max_norm" else None
    return poses.relative(poses.resample(c2w, latent_frames), pose.reference, normalise)


def encode_prompt(text_encoder: TextEncoder, prompt: str) -> np.ndarray:
    """Text tokens `1 l d` of a prompt. Raises ConfigError where it is empty or would be cut."""
    require(bool(prompt.strip()), "prompt", prompt, "is empty; describe the world in a sentence")
    tokens = text_encoder.encode([prompt])
    shown = prompt if len(prompt) < 40 else prompt[:37] + "..."
    require(
        not np.any(tokens[0, -1]),
        "prompt",
        shown,
        f"too long: it fills all {text_encoder.length} text tokens; shorten it",
    )
    return tokens


def read_guidance(values: list[str]) -> Guidance:
    try:
        scales = [float(v) for v in values]
    except ValueError:
        scales = []
    require(len(scales) in (1, 2), "guidance", ",".join(values), "must be one number or two: low,high")
    return Guidance(low=scales[0], high=scales[-1])


def read_size(text: str, field: str) -> tuple[int, int]:
    """(height, width) of `HxW`."""
    parts = text.lower().split("x")
    ok = len(parts) == 2 and all(p.isdigit() and int(p) > 0 for p in parts)
    require(ok, field, text, "must be HxW, such as 480x832")
    return int(parts[0]), int(parts[1])


def video_size(image: np.ndarray, size: str, multiple: int) -> tuple[int, int]:
    """Height and width of the video for an image and --size."""
    height, width = image.shape[:2]
    if size == "image":
        fitted = (height // multiple * multiple, width // multiple * multiple)
        require(min(fitted) > 0, "image", f"{width}x{height}", f"must be at least {multiple}x{multiple}")
        return fitted
    require(size in images.PRESETS, "size", size, f"must be image, {', '.join(images.PRESETS)}")
    return images.fit(height, width, images.PRESETS[size], multiple)


def required(name: str) -> Any:
    value = getattr(FLAGS, name)
    if value is None:
        raise common.UserError(f"--{name} is missing: {FLAGS[name].help}")
    return value


def write_result(out: pathlib.Path, video: np.ndarray, path: Path, about: dict[str, Any]) -> None:
    """Writes the result folder under a temporary name beside `out` and renames it when it is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        write_mp4(partial / "video.mp4", video, about["fps"])
        np.save(partial / "poses.npy", path.c2w)
        np.save(partial / "keys.npy", path.keys)
        (partial / "generation.json").write_text(json.dumps(about, indent=2) + "\n")
        partial.chmod(0o755)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def command() -> str:
    """The command line that repeats this generation: every flag that is not at its default."""
    module = FLAGS.find_module_defining_flag("negative_prompt")
    given = [f for f in FLAGS.flags_by_module_dict()[module] if f.value != f.default]
    return shlex.join(
        ["python", "-m", "experiments.generate", *(f.serialize() for f in given if f.serialize())]
    )


def main() -> None:
    began = time.monotonic()
    run, image_file, prompt, out = (required(n) for n in ("run", "image", "prompt", "out"))
    if (FLAGS.keys is None) == (FLAGS.camera is None):
        raise common.UserError("--keys and --camera: give exactly one of them")
    out = pathlib.Path(out)
    if out.exists():
        raise common.UserError(f"--out={out}: exists already; choose another folder or remove it")
    config = bidirectional.SampleConfig(
        steps=FLAGS.steps,
        shift=FLAGS.shift,
        solver=FLAGS.solver,
        guidance=read_guidance(FLAGS.guidance),
        negative_prompt=FLAGS.negative_prompt,
    )
    require(FLAGS.fps > 0, "fps", FLAGS.fps, "must be positive")
    image = images.read_image(image_file)
    world = open_run(run)

    stride = world.codec.config.stride
    height, width = video_size(
        image, FLAGS.size, world.config.model.spatial_stride * world.config.model.patch[1]
    )
    if FLAGS.keys is not None:
        path = path_from_keys(FLAGS.keys, height, width, walk=FLAGS.walk, turn=FLAGS.turn, fov=FLAGS.fov)
    else:
        base = read_size(FLAGS.camera_size, "camera_size")
        path = path_from_folder(FLAGS.camera, base, height, width)
    frames = clip_length(len(path.c2w), FLAGS.frames, stride[0], pad=FLAGS.keys is not None)
    console = Console()
    if frames != len(path.c2w):
        console.print(f"{frames} frames: {len(path.c2w)} given, {stride[0]}n + 1 needed")
    path = pad_path(path, frames)

    latent_frames = world.codec.config.latent_frames(frames)
    given = jnp.asarray(images.resize(image, height, width))[None, None]
    mask, conditioning = bidirectional.given_frames(world.codec, given, latent_frames)
    condition = Condition(
        text=jnp.asarray(encode_prompt(world.text_encoder, prompt)),
        control=make_control(path, world, height, width),
        mask=mask,
        image=conditioning,
    )
    with console.status(f"{frames} frames of {width}x{height}, {config.steps} steps"):
        video = bidirectional.sample_clips(
            world.model, world.codec, world.text_encoder, condition, config, seed=FLAGS.seed
        )
        video = np.asarray(bidirectional.to_uint8(video[0]))
    about = {
        "command": command(),
        "image_sha256": hashlib.sha256(pathlib.Path(image_file).read_bytes()).hexdigest(),
        "sample": dataclasses.asdict(config),
        "seed": FLAGS.seed,
        "prompt": prompt,
        "keys": keyboard.to_text(path.keys) if frames > 1 else "",
        "frames": frames,
        "height": height,
        "width": width,
        "fps": FLAGS.fps,
        "seconds": round(time.monotonic() - began, 2),
    }
    write_result(out, video, path, about)
    console.print(f"{out / 'video.mp4'}  {frames} frames of {width}x{height}, {about['seconds']} s")


if __name__ == "__main__":
    common.run(main)
