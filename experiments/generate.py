"""Generates a video from a trained world: first frame + keys (or recorded poses) + prompt -> MP4.

python -m experiments.generate --run=runs/demo/action --image=door.png --keys=w-20,wl-12 --prompt="a hall" \
    --out=runs/demo/clip

--mode=base samples the whole clip at once with many steps; --mode=fast generates chunk after chunk with few
steps and takes prompt events. Writes a folder: video.mp4, poses.npy and keys.npy (one row a frame), and
generation.json, whose `command` makes the same video again. The folder appears when everything in it is
complete, or not at all. docs/generation.md explains the flags.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import shlex
import shutil
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import common
from experiments.worlds import World, open_world
from lingbot_jax.config import ConfigError, require
from lingbot_jax.control import keyboard, poses
from lingbot_jax.diffusion.guidance import Guidance
from lingbot_jax.models.codec import to_uint8
from lingbot_jax.models.experts import NoiseExperts
from lingbot_jax.models.text import TextEncoder, fills
from lingbot_jax.rollout.bidirectional import SampleConfig, sample_clips
from lingbot_jax.rollout.causal import CausalConfig
from lingbot_jax.rollout.stream import Session, SessionConfig
from lingbot_jax.rollout.windows import count as windows_of
from lingbot_jax.rollout.windows import extend
from lingbot_jax.training.encode import ClipEncoder

FLAGS = flags.FLAGS
flags.DEFINE_string("run", None, "run directory of experiments.train, or bundle of experiments.convert")
flags.DEFINE_enum("mode", "base", ["base", "fast"], "whole clip with many steps, or chunks with few")
flags.DEFINE_string("image", None, "first frame: an image file")
flags.DEFINE_string("prompt", None, "what the world looks like")
flags.DEFINE_string("negative_prompt", None, "what it must not look like (base; default: the bundle's)")
flags.DEFINE_string("keys", None, "keys as <keys>-<frames>,...: w-20,wl-12,none-8 (W A S D I J K L)")
flags.DEFINE_string("camera", None, "folder with poses.npy [f 4 4] and intrinsics.npy [f 4] instead of keys")
flags.DEFINE_string("camera_size", "480x832", "HxW of the image that intrinsics.npy belongs to")
flags.DEFINE_list("intrinsics", None, "fx,fy,cx,cy in pixels of --image, with --keys; default: from --fov")
flags.DEFINE_float("fov", 90.0, "horizontal field of view in degrees, with --keys")
flags.DEFINE_float("walk", keyboard.STEP, "world units a frame of a movement key")
flags.DEFINE_float("turn", keyboard.DEGREES, "degrees a frame of a looking key")
flags.DEFINE_integer("frames", None, "video frames; default: as many as the keys or poses give")
flags.DEFINE_string("size", "image", "480p, 720p (areas; the image's aspect is kept), or image: its own size")
flags.DEFINE_integer("clip_frames", None, "video frames generated at a time, 4n+1 (base; default: all)")
flags.DEFINE_integer("overlap", 5, "video frames a clip takes over from the one before, 4n+1 (base)")
flags.DEFINE_integer("steps", None, "denoising steps (base; default: the bundle's, 20 for a run)")
flags.DEFINE_float("shift", None, "timestep shift; default: the bundle's or the run's")
flags.DEFINE_list("guidance", None, "scale, or low-noise,high-noise scales; 1 is off (base)")
flags.DEFINE_enum("solver", None, ["unipc", "dpmpp", "euler"], "ODE solver (base; default unipc)")
flags.DEFINE_integer("chunk", None, "latent frames a chunk (fast)")
flags.DEFINE_integer("window", None, "latent frames a chunk sees, sink and itself included (fast)")
flags.DEFINE_integer("sink", None, "first latent frames that stay visible (fast)")
flags.DEFINE_string("events", "", 'prompt events (fast): "4.0s: it starts to snow; 9.0s+2.0s: fireworks"')
flags.DEFINE_integer("blend", 0, "chunks over which a lasting event blends in (fast)")
flags.DEFINE_bool("reencode", False, "write the cached window again under the text of each event (fast)")
flags.DEFINE_integer("seed", 0, "of the noise")
flags.DEFINE_integer("fps", 16, "video frames a second, of the file and of --events")
flags.DEFINE_integer("zoom", 1, "enlargement of the video file, for small worlds", lower_bound=1)
flags.DEFINE_string("out", None, "folder to write; must not exist yet", allow_override=True)

BASE_ONLY = ("negative_prompt", "clip_frames", "overlap", "steps", "guidance", "solver")
FAST_ONLY = ("chunk", "window", "sink", "events", "blend", "reencode")


@dataclasses.dataclass(frozen=True)
class Path:
    """The camera's path, one row a video frame: poses, intrinsics in pixels of the video, keys."""

    c2w: np.ndarray
    intrinsics: np.ndarray
    keys: np.ndarray

    def window(self, start: int, frames: int) -> "Path":
        """`frames` rows from `start`; after the end the camera stands still. The first has no transition."""
        part = Path(self.c2w[start:], self.intrinsics[start:], self.keys[start:]).fitted(frames)
        part.keys[0] = False
        return part

    def fitted(self, frames: int) -> "Path":
        """Cut to `frames`, or standing still after the end."""
        more = max(frames - len(self.c2w), 0)
        grow = lambda a: np.concatenate([a, np.repeat(a[-1:], more, axis=0)])[:frames]
        keys = np.concatenate([self.keys, np.zeros((more, 8), bool)])[:frames]
        return Path(grow(self.c2w), grow(self.intrinsics), keys)


def path_from_keys(image_size: tuple[int, int], height: int, width: int) -> Path:
    """Integrates --keys; a pinhole camera of --intrinsics, or centred with --fov."""
    for name in ("walk", "turn"):
        require(getattr(FLAGS, name) > 0, name, getattr(FLAGS, name), "must be positive")
    require(0 < FLAGS.fov < 180, "fov", FLAGS.fov, "must be between 0 and 180 degrees")
    keys = keyboard.parse(FLAGS.keys)
    c2w = keyboard.integrate(keys, step=FLAGS.walk, yaw_degrees=FLAGS.turn, pitch_degrees=FLAGS.turn)
    if FLAGS.intrinsics is None:
        focal = width / 2 / np.tan(np.radians(FLAGS.fov) / 2)
        intrinsics = np.array([focal, focal, width / 2, height / 2])
    else:
        given = poses.validate_intrinsics(read_numbers("intrinsics", 4), 1)
        intrinsics = poses.transform_intrinsics(given, (height, width), base=image_size)[0]
    return Path(c2w, np.tile(intrinsics, (len(keys), 1)), keys)


def path_from_folder(height: int, width: int) -> Path:
    """Recorded poses; keys are read off the motion, with half of the usual displacement as threshold."""
    c2w, intrinsics = poses.load(FLAGS.camera)
    moved = np.linalg.norm(np.diff(c2w[:, :3, 3], axis=0), axis=1)
    usual = float(np.median(moved[moved > 0])) if (moved > 0).any() else keyboard.STEP
    keys = keyboard.keys_from_poses(c2w, move=usual / 2)
    base = read_size(FLAGS.camera_size, "camera_size")
    return Path(c2w, poses.transform_intrinsics(intrinsics, (height, width), base=base), keys)


def clip_length(have: int, wanted: int | None, stride: int, chunk: int, *, pad: bool) -> int:
    """Frames of the video. Allowed are those of whole chunks of latent frames: stride * (chunk * n - 1) + 1.

    Args:
      have: rows of the path. wanted: --frames, or None for what the path gives: rounded up to an allowed
        length with `pad` (keys: stand still), else down as published (recorded poses).

    Raises:
      ConfigError: `wanted` is not allowed, or longer than recorded poses.
    """
    length = lambda n: stride * (chunk * n - 1) + 1
    chunks = (have - 1 + stride) / (stride * chunk)
    if wanted is None:
        n = int(np.ceil(chunks) if pad else np.floor(chunks))
        require(n > 0, "camera", f"{have} poses", f"a chunk needs {length(1)}")
        return length(n)
    nearest = length(max(1, round((wanted - 1 + stride) / (stride * chunk))))
    rule = f"{stride}n + 1" if chunk == 1 else f"{stride * chunk}n - {stride - 1} (whole chunks)"
    require(wanted == nearest, "frames", wanted, f"must be {rule}; the nearest is {nearest}")
    require(pad or wanted <= have, "frames", wanted, f"the poses give {have}; record more, or ask for less")
    return wanted


def read_numbers(name: str, *counts: int) -> list[float]:
    """The numbers of a list flag. Raises ConfigError unless there are as many as one of `counts`."""
    values = getattr(FLAGS, name)
    try:
        numbers = [float(v) for v in values]
    except ValueError:
        numbers = []
    allowed = " or ".join(str(c) for c in counts)
    require(len(numbers) in counts, name, ",".join(values), f"must be {allowed} numbers with commas")
    return numbers


def read_size(text: str, field: str) -> tuple[int, int]:
    """(height, width) of `HxW`."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.lower())
    require(found is not None, field, text, "must be HxW, such as 480x832")
    return int(found[1]), int(found[2])


def video_size(image: np.ndarray, size: str, multiple: int) -> tuple[int, int]:
    """Height and width of the video for an image and --size."""
    from lingbot_jax.rollout import images

    height, width = image.shape[:2]
    if size == "image":
        fitted = (height // multiple * multiple, width // multiple * multiple)
        require(min(fitted) > 0, "image", f"{width}x{height}", f"must be at least {multiple}x{multiple}")
        return fitted
    require(size in images.PRESETS, "size", size, f"must be image, {', '.join(images.PRESETS)}")
    return images.fit(height, width, images.PRESETS[size], multiple)


@dataclasses.dataclass(frozen=True)
class Event:
    """A line of --events: from `second` on, for `seconds` (None: it stays), `text` joins the prompt."""

    second: float
    seconds: float | None
    text: str


def parse_events(script: str) -> list[Event]:
    """Reads `4.0s: it starts to snow; 9.0s+2.0s: fireworks`.

    Raises:
      ConfigError: names the event, counted from 1, and what is expected; or they are not in order.
    """
    events: list[Event] = []
    for i, line in enumerate(filter(str.strip, script.split(";")), 1):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)s(?:\+(\d+(?:\.\d+)?)s)?\s*:\s*(\S.*?)\s*", line, re.DOTALL)
        require(
            found is not None,
            f"events, event {i}",
            line.strip(),
            "expected <second>s: <text>, or <second>s+<seconds>s: <text> for a passing one",
        )
        events.append(Event(float(found[1]), None if found[2] is None else float(found[2]), found[3]))
        ordered = len(events) < 2 or events[-2].second <= events[-1].second
        require(ordered, f"events, event {i}", line.strip(), "is earlier than the one before it")
    return events


def check_prompt(text_encoder: TextEncoder, prompt: str, field: str = "prompt") -> None:
    """Raises ConfigError where a prompt is empty or would be cut."""
    require(bool(prompt.strip()), field, prompt, "is empty; describe the world in a sentence")
    shown = prompt if len(prompt) < 40 else prompt[:37] + "..."
    fits = not fills(text_encoder, [prompt])[0]
    require(fits, field, shown, f"too long: it fills all {text_encoder.length} text tokens; shorten it")


def required(name: str) -> Any:
    value = getattr(FLAGS, name)
    if value is None:
        raise common.UserError(f"--{name} is missing: {FLAGS[name].help}")
    return value


def translation_unit(path: Path, world: World) -> float:
    """World units that become 1 in control translations, for the whole path at once."""
    if world.pose.translation == "metric":
        return 1.0
    stride = world.codec.config.stride[0]
    latent = poses.relative(poses.resample(path.c2w, (len(path.c2w) - 1) // stride + 1), world.pose.reference)
    largest = float(np.linalg.norm(latent[:, :3, 3], axis=-1).max())
    return largest if largest > 0 else 1.0


def sample_config(world: World) -> SampleConfig:
    """The world's own way of sampling, with what the flags say."""
    require(world.sample is not None, "mode", "base", "this bundle is a fast model; use --mode=fast")
    changes: dict[str, Any] = {n: getattr(FLAGS, n) for n in ("steps", "shift", "solver", "negative_prompt")}
    if FLAGS.guidance is not None:
        scales = read_numbers("guidance", 1, 2)
        changes["guidance"] = Guidance(scales[0], scales[-1])
    return dataclasses.replace(world.sample, **{k: v for k, v in changes.items() if v is not None})


def causal_config(world: World) -> CausalConfig:
    """The world's own chunks and window, with what the flags say."""
    require(world.causal is not None, "mode", "fast", "this bundle is a base model; use --mode=base")
    require(not isinstance(world.model, NoiseExperts), "mode", "fast", "needs a world of one expert")
    changes = {n: getattr(FLAGS, n) for n in ("chunk", "window", "sink", "shift")}
    return dataclasses.replace(world.causal, **{k: v for k, v in changes.items() if v is not None})


def run_base(
    world: World, first: np.ndarray, path: Path, config: SampleConfig, progress: Progress
) -> np.ndarray:
    """The whole clip at once, or window by window: uint8 frames."""
    encoder = ClipEncoder(world.codec, world.text_encoder, world.config, world.pose)
    frames = len(path.c2w)
    window = FLAGS.clip_frames or frames
    overlap = FLAGS.overlap if window < frames else 1
    windows = windows_of(frames, window, overlap)
    task = progress.add_task(
        f"{frames} frames of {first.shape[1]}x{first.shape[0]}", total=windows * config.steps
    )
    on_step = lambda: progress.advance(task)

    def generate(known: np.ndarray, start: int) -> np.ndarray:
        part = path.window(start, window)
        shown = np.zeros((window, *first.shape), np.float32)
        shown[: len(known)] = known
        recording = {"frames": shown, "keys": part.keys, "c2w": part.c2w, "intrinsics": part.intrinsics}
        given = np.array([world.codec.config.latent_frames(len(known))])
        condition = encoder.condition({k: v[None] for k, v in recording.items()}, [FLAGS.prompt], given)
        video = sample_clips(
            world.model,
            world.codec,
            world.text_encoder,
            condition,
            config,
            seed=FLAGS.seed,
            indices=[start],
            on_step=on_step,
        )
        return np.asarray(video[0])

    video = extend(first, frames, window, overlap, generate)
    jax.effects_barrier()
    return np.asarray(to_uint8(video))


def run_fast(
    world: World, first: np.ndarray, path: Path, config: CausalConfig, events: list[Event], progress: Progress
) -> np.ndarray:
    """Chunk after chunk: uint8 frames. An event takes effect with the first chunk that starts at its time."""
    session = Session(
        world.model,
        world.codec,
        world.text_encoder,
        SessionConfig(config, reference=world.pose.reference, unit=translation_unit(path, world)),
    )
    session.start(first, FLAGS.prompt, FLAGS.seed, path.intrinsics[0])
    frames = len(path.c2w)
    task = progress.add_task(f"{frames} frames of {first.shape[1]}x{first.shape[0]}", total=frames)
    waiting, at, video = list(events), 0, []
    chunk_frames = config.chunk * world.codec.config.stride[0]
    while at < frames:
        while waiting and waiting[0].second * FLAGS.fps <= at:
            event = waiting.pop(0)
            if event.seconds is None:
                session.say(
                    f"{session.walk.prompt} {event.text}", chunks=FLAGS.blend, reencode=FLAGS.reencode
                )
            else:
                lasts = max(1, round(event.seconds * FLAGS.fps / chunk_frames))
                session.say(event.text, scope="local", chunks=lasts, reencode=FLAGS.reencode)
        stop = at + session.transitions + (at == 0)
        video.append(session.step(path.keys[max(at, 1) : stop], path.c2w[at:stop]))
        progress.update(task, completed=stop)
        at = stop
    return np.concatenate(video)


def write_result(out: pathlib.Path, video: np.ndarray, path: Path, about: dict[str, Any]) -> None:
    """Writes the result folder under a temporary name beside `out` and renames it when it is whole."""
    from lingbot_jax.data.video import write_mp4

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        write_mp4(partial / "video.mp4", video, about["fps"], scale=about["zoom"])
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
    return shlex.join(["python", "-m", "experiments.generate", *(f.serialize() for f in given)])


def main() -> None:
    try:
        from lingbot_jax.rollout import images
    except ModuleNotFoundError as error:
        raise common.UserError(f"{error.name} is not installed: pip install -e '.[data,serve]'") from None

    began = time.monotonic()
    run, image_file, prompt, out = (required(n) for n in ("run", "image", "prompt", "out"))
    if (FLAGS.keys is None) == (FLAGS.camera is None):
        raise common.UserError("--keys and --camera: give exactly one of them")
    for name in FAST_ONLY if FLAGS.mode == "base" else BASE_ONLY:
        if FLAGS[name].value != FLAGS[name].default:
            raise common.UserError(f"--{name}: means nothing with --mode={FLAGS.mode}")
    out = pathlib.Path(out)
    if out.exists():
        raise common.UserError(f"--out={out}: exists already; choose another folder or remove it")
    require(FLAGS.fps > 0, "fps", FLAGS.fps, "must be positive")
    events, image = parse_events(FLAGS.events), images.read_image(image_file)

    world = open_world(run)
    check_prompt(world.text_encoder, prompt)
    config = sample_config(world) if FLAGS.mode == "base" else causal_config(world)
    stride, chunk = world.codec.config.stride[0], 1 if FLAGS.mode == "base" else config.chunk
    multiple = world.config.spatial_stride * world.config.patch[1]
    height, width = video_size(image, FLAGS.size, multiple)
    by_keys = FLAGS.keys is not None
    path = path_from_keys(image.shape[:2], height, width) if by_keys else path_from_folder(height, width)
    frames = clip_length(len(path.c2w), FLAGS.frames, stride, chunk, pad=by_keys)
    for i, event in enumerate(events, 1):
        check_prompt(world.text_encoder, f"{prompt} {event.text}", f"events, event {i}")
        if event.second * FLAGS.fps >= frames:
            raise ConfigError(
                f"events, event {i} = {event.second:g}s: the video ends at {frames / FLAGS.fps:g}s"
            )
    console = Console()
    if frames != len(path.c2w):
        console.print(f"{frames} frames instead of the path's {len(path.c2w)}: whole chunks of latent frames")
    path = path.fitted(frames)

    first = images.resize(image, height, width)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        if FLAGS.mode == "base":
            video = run_base(world, first, path, config, progress)
        else:
            video = run_fast(world, first, path, config, events, progress)
    about = {
        "command": command(),
        "image_sha256": hashlib.sha256(pathlib.Path(image_file).read_bytes()).hexdigest(),
        "mode": FLAGS.mode,
        "sampling": dataclasses.asdict(config),
        "seed": FLAGS.seed,
        "prompt": prompt,
        "events": [dataclasses.asdict(event) for event in events],
        "keys": keyboard.to_text(path.keys) if frames > 1 else "",
        "frames": frames,
        "height": height,
        "width": width,
        "fps": FLAGS.fps,
        "zoom": FLAGS.zoom,
        "seconds": round(time.monotonic() - began, 2),
    }
    write_result(out, video, path, about)
    console.print(f"{out / 'video.mp4'}  {frames} frames of {width}x{height}, {about['seconds']} s")


if __name__ == "__main__":
    common.run(main)
