"""From an image, a path of the camera and a prompt to video frames, as one value: what `experiments.generate` runs.

plan      everything that can be checked before the world's arrays are read
frames    the video: window by window (base), or chunk after chunk (fast)
write     the result folder
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from pydantic import Field

from lingbot_jax.config import Count, Number, Path, Positive, Seed, Text, config, require
from lingbot_jax.control import keyboard, poses
from lingbot_jax.diffusion.guidance import Guidance, Scale
from lingbot_jax.diffusion.solvers import SolverName
from lingbot_jax.files import whole_file, write_whole
from lingbot_jax.models.codec import to_uint8
from lingbot_jax.models.text import TextEncoder, is_truncated
from lingbot_jax.rollout import events, windows
from lingbot_jax.rollout.long import play_path, sample_windows
from lingbot_jax.rollout.path import CameraPath, clip_length, from_folder, from_keys, pinhole
from lingbot_jax.rollout.sample import sample_config
from lingbot_jax.rollout.session import Session, SessionConfig, causal_config
from lingbot_jax.worlds.config import SampleConfig, WorldConfig, pixels_per_token
from lingbot_jax.worlds.world import World

MAX_SIDE = 16384  # pixels of a video file: what H.264 has a level for
Side = Annotated[int, Field(gt=0, le=MAX_SIDE)]
Rate = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
BASE_ONLY = ("negative_prompt", "clip_frames", "overlap", "steps", "guidance", "solver")
FAST_ONLY = ("chunk", "window", "sink", "events", "blend", "rebuild_cache")


@config
class GenerateConfig:
    """One video. Fields are the flags of experiments.generate."""

    run: Path = Field(description="run of experiments.train, or bundle of experiments.convert")
    image: Path = Field(description="first frame: an image file")
    prompt: Text = Field(description="what the world looks like")
    out: Path = Field(description="folder to write; must not exist yet")
    mode: Literal["base", "fast"] = Field(
        "base", description="whole clip with many steps, or chunks with few"
    )
    keys: Text | None = Field(
        None, description="keys as <keys>-<frames>,...: w-20,wl-12,none-8 (W A S D I J K L)"
    )
    camera: Path | None = Field(
        None, description="folder with poses.npy [f 4 4] and intrinsics.npy [f 4], in place of keys"
    )
    camera_size: tuple[Side, Side] = Field(
        (480, 832), description="HxW of the image that intrinsics.npy belongs to"
    )
    intrinsics: tuple[Number, Number, Number, Number] | None = Field(
        None, description="fx,fy,cx,cy in pixels of the image, with keys; none: from fov"
    )
    fov: Annotated[float, Field(gt=0, lt=180, allow_inf_nan=False)] = Field(
        90.0, description="horizontal field of view in degrees, with keys"
    )
    step_size: Rate | None = Field(
        None, description="world units of a movement key per frame; none: the world's own"
    )
    turn_rate: Annotated[float, Field(gt=0, le=180, allow_inf_nan=False)] | None = Field(
        None, description="degrees of a looking key per frame; none: the world's own"
    )
    frames: Annotated[int, Field(gt=0, le=keyboard.MAX_FRAMES)] | None = Field(
        None, description="video frames; none: as many as the keys or poses give"
    )
    size: Annotated[Text, Field(max_length=64)] = Field(
        "image", description="480p, 720p (areas; the image's aspect is kept), or image: its own size"
    )
    clip_frames: Annotated[int, Field(gt=0, le=keyboard.MAX_FRAMES)] | None = Field(
        None, description="video frames generated at a time, 4n + 1 (base); none: all"
    )
    overlap: Annotated[int, Field(gt=0, le=keyboard.MAX_FRAMES)] = Field(
        5, description="video frames that a clip takes over from the one before, 4n + 1 (base)"
    )
    steps: Annotated[int, Field(gt=0, le=1000)] | None = Field(
        None, description="denoising steps (base); none: the world's own"
    )
    shift: Annotated[Positive, Field(le=1000)] | None = Field(
        None, description="timestep shift; none: the world's own"
    )
    guidance: tuple[Scale, ...] | None = Field(
        None, description="scale, or low-noise,high-noise scales; 1 is off (base); none: the world's own"
    )
    solver: SolverName | None = Field(None, description="ODE solver (base); none: the world's own")
    negative_prompt: Text | None = Field(
        None, description="what it must not look like (base); none: the world's own"
    )
    chunk: Annotated[int, Field(gt=0, le=4096)] | None = Field(
        None, description="latent frames of a chunk (fast); none: the world's own"
    )
    window: Annotated[int, Field(gt=0, le=65536)] | None = Field(
        None, description="latent frames that a chunk sees, sink and itself included (fast)"
    )
    sink: Annotated[int, Field(ge=0, le=65536)] | None = Field(
        None, description="first latent frames that stay visible (fast)"
    )
    events: Text = Field(
        "", description='prompt events (fast): "4.0s: it starts to snow; 9.0s+2.0s: fireworks"'
    )
    blend: Count = Field(0, description="chunks over which a lasting event blends in (fast)")
    rebuild_cache: bool = Field(
        False, description="write the cached window again under the text of each event (fast)"
    )
    seed: Seed = Field(0, description="of the noise")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="of the parameters; none: as they are stored"
    )
    fps: Annotated[int, Field(gt=0, le=1000)] = Field(
        16, description="video frames per second, of the file and of events"
    )
    zoom: Annotated[int, Field(gt=0, le=64)] = Field(
        1, description="enlargement of the video file, for small worlds"
    )

    def __post_init__(self):
        both = (self.keys is None) == (self.camera is None)
        require(not both, "keys, camera", (self.keys, self.camera), "give exactly one of them")
        for name in FAST_ONLY if self.mode == "base" else BASE_ONLY:
            default = type(self).__pydantic_fields__[name].default
            value = getattr(self, name)
            require(value == default, name, value, f"means nothing with --mode={self.mode}")
        require(
            bool(self.prompt.strip()), "prompt", self.prompt, "is empty; describe the world in a sentence"
        )
        scales = self.guidance
        require(scales is None or len(scales) in (1, 2), "guidance", scales, "must be 1 or 2 scales")
        events.parse(self.events)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A generation before it begins.

    Attributes:
      sample: how it is sampled (base), or session: how it is played (fast).
      first: the first frame in [-1, 1]. path: one row per frame. given: rows that keys or poses gave.
    """

    config: GenerateConfig
    sample: SampleConfig | None
    session: SessionConfig | None
    first: Float[np.ndarray, "H W 3"]
    path: CameraPath
    given: int
    events: tuple[events.Event, ...]
    windows: windows.Windows | None

    @property
    def work(self) -> int:
        """What `frames` counts up to: denoising steps of all windows, or frames."""
        return len(self.path) if self.windows is None else self.windows.count * self.sample.steps


def chosen_sample(own: SampleConfig, guidance: tuple[float, ...] | None = None, **given: Any) -> SampleConfig:
    """A world's own way of sampling, with what is given (not None) in place of it."""
    if guidance is not None:
        given["guidance"] = Guidance(guidance[0], guidance[-1], own.guidance.batched)
    return dataclasses.replace(own, **{name: value for name, value in given.items() if value is not None})


def plan(config: GenerateConfig, world: WorldConfig) -> Plan:
    """Reads image and path and fits them to a world; none of its arrays is needed.

    Raises:
      ConfigError: files that are none, sizes and lengths that the world has not, or a mode that it has not.
    """
    from lingbot_jax.rollout import images  # needs an extra

    network, stride = world.network, world.codec.stride[0]
    changes = {n: getattr(config, n) for n in ("step_size", "turn_rate")}
    keys_do = dataclasses.replace(world.keyboard, **{k: v for k, v in changes.items() if v is not None})
    sample = session = causal = None
    if config.mode == "base":
        names = ("steps", "shift", "solver", "negative_prompt", "guidance")
        own = sample_config(world, f"run = {config.run!r}")
        sample, chunk = chosen_sample(own, **{n: getattr(config, n) for n in names}), 1
    else:
        changes = {n: getattr(config, n) for n in ("chunk", "window", "sink", "shift")}
        causal = causal_config(world)
        causal = dataclasses.replace(causal, **{k: v for k, v in changes.items() if v is not None})
        chunk = causal.chunk
    image = images.read_image(config.image)
    multiple = int(np.lcm(*pixels_per_token(network)))
    size = images.video_size(*image.shape[:2], config.size, multiple)
    largest = config.zoom * max(size)
    require(
        largest <= MAX_SIDE, "zoom", config.zoom, f"a side of the video becomes {largest} > {MAX_SIDE} pixels"
    )
    if config.keys is None:
        path = from_folder(config.camera, size, config.camera_size)
    else:
        intrinsics = pinhole(size, config.fov)
        if config.intrinsics is not None:
            given = poses.validate_intrinsics(np.array(config.intrinsics), 1)
            intrinsics = poses.transform_intrinsics(given, size, base=image.shape[:2])[0]
        path = from_keys(config.keys, keys_do, intrinsics)
    pad = config.keys is not None
    frames, given = clip_length(len(path), config.frames, stride, chunk, pad=pad), len(path)
    # Keys stand still to the end of a chunk; recorded poses are stretched over whole chunks, as published.
    used = frames if pad or config.frames else (given - 1) // stride * stride + 1
    path, script = path.fitted(used).stretched(frames), events.parse(config.events)
    for i, event in enumerate(script, 1):
        inside = event.second * config.fps < frames
        require(
            inside, f"events, event {i}", f"{event.second:g}s", f"the video ends at {frames / config.fps:g}s"
        )
    cut = None
    if sample is not None:
        cut = windows.Windows(frames, config.clip_frames or frames, config.overlap, stride)
    else:
        if causal.window is None:  # all of the video, whose length is known here
            causal = dataclasses.replace(causal, window=world.codec.latent_frames(frames))
        unit = path.unit(world.pose, stride)
        session = SessionConfig.of(world, causal=causal, keyboard=keys_do, unit=unit)
    first = images.resize(image, *size)
    return Plan(config, sample, session, first, path, given, script, cut)


def check_prompts(plan: Plan, text: TextEncoder) -> None:
    """Raises ConfigError where a prompt would be cut."""
    prompts = {"prompt": plan.config.prompt}
    for i, event in enumerate(plan.events, 1):
        prompts[f"events, event {i}"] = f"{plan.config.prompt} {event.text}"
    for field, prompt in prompts.items():
        shown = prompt if len(prompt) < 40 else prompt[:37] + "..."
        whole = not is_truncated(text, [prompt])[0]
        require(whole, field, shown, f"too long: it fills all {text.length} text tokens; shorten it")


def frames(plan: Plan, world: World, advance: Callable[[int], None]) -> UInt8[np.ndarray, "f H W 3"]:
    """The video.

    Args:
      advance: called with how much of `plan.work` has just been done.
    """
    return _base(plan, world, advance) if plan.session is None else _fast(plan, world, advance)


def _base(plan: Plan, world: World, advance: Callable[[int], None]) -> UInt8[np.ndarray, "f H W 3"]:
    """The whole clip at once, or window by window."""
    config = plan.config
    on_step = lambda: advance(1)
    video = sample_windows(
        world,
        plan.first,
        plan.path,
        plan.windows,
        config.prompt,
        plan.sample,
        seed=config.seed,
        on_step=on_step,
    )
    jax.effects_barrier()
    return np.asarray(to_uint8(video))


def _fast(plan: Plan, world: World, advance: Callable[[int], None]) -> UInt8[np.ndarray, "f H W 3"]:
    """Chunk after chunk. An event takes effect with the first chunk that starts at its time."""
    config, path = plan.config, plan.path
    session = Session(world, **vars(plan.session))
    session.start(plan.first, config.prompt, config.seed, path.intrinsics[0])
    chunk_frames = plan.session.causal.chunk * world.config.codec.stride[0]
    waiting = list(plan.events)

    def events_until(at: int) -> None:
        while waiting and waiting[0].second * config.fps <= at:
            event, again = waiting.pop(0), config.rebuild_cache
            if event.seconds is None:
                prompt = f"{session.host.prompt} {event.text}"
                session.set_prompt(prompt, chunks=config.blend, rebuild_cache=again)
            else:
                lasts = max(1, round(event.seconds * config.fps / chunk_frames))
                session.set_prompt(event.text, scope="local", chunks=lasts, rebuild_cache=again)

    return play_path(session, path, advance, events_until)


def about(plan: Plan) -> dict[str, Any]:
    """What generation.json says of a video."""
    height, width = plan.first.shape[:2]
    how = plan.sample if plan.session is None else plan.session.causal
    return {
        "mode": plan.config.mode,
        "sampling": dataclasses.asdict(how),
        "seed": plan.config.seed,
        "prompt": plan.config.prompt,
        "events": [dataclasses.asdict(event) for event in plan.events],
        "keys": keyboard.to_text(plan.path.keys) if len(plan.path) > 1 else "",
        "frames": len(plan.path),
        "height": height,
        "width": width,
        "fps": plan.config.fps,
        "zoom": plan.config.zoom,
    }


def write(
    folder: epath.PathLike, plan: Plan, video: UInt8[np.ndarray, "f H W 3"], about: dict[str, Any]
) -> None:
    """Writes video.mp4, poses.npy, keys.npy and generation.json into an empty folder, local or gs://."""
    from lingbot_jax.data.video import write_mp4  # needs an extra

    folder = epath.Path(folder)
    with whole_file(folder / "video.mp4") as file:
        write_mp4(file, video, plan.config.fps, scale=plan.config.zoom)
    for name, rows in (("poses.npy", plan.path.c2w), ("keys.npy", plan.path.keys)):
        with whole_file(folder / name) as file, file.open("wb") as opened:
            np.save(opened, rows)
    write_whole(folder / "generation.json", json.dumps(about, indent=2) + "\n")
