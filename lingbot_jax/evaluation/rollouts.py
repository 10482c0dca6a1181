"""Long videos of held-out clips by any world: played chunk after chunk, or sampled window after window."""

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

from lingbot_jax.control import keyboard
from lingbot_jax.evaluation.post_training import Clips
from lingbot_jax.evaluation.suite import Rows
from lingbot_jax.models.codec import to_float, to_uint8
from lingbot_jax.rollout import windows
from lingbot_jax.rollout.long import play_path, sample_windows
from lingbot_jax.rollout.path import CameraPath, clip_length
from lingbot_jax.worlds.world import World

Advance = Callable[[], None]


def steady(clips: Rows) -> Rows:
    """The clips in whose scene nothing changes: their first caption holds to their end."""
    keep = np.asarray(clips["scene"]) == np.asarray(clips["static"])
    return {name: values[keep] for name, values in clips.items()}


def as_clips(videos: UInt8[np.ndarray, "b f H W 3"], clips: Rows) -> Clips:
    """Videos with the camera paths of the clips that they follow."""
    return Clips(videos, clips["c2w"], clips["intrinsics"][:, 0])


def _path(clips: Rows, i: int) -> CameraPath:
    return CameraPath(clips["c2w"][i], clips["intrinsics"][i], clips["keys"][i].astype(bool))


def play(world: World, clips: Rows, advance: Advance = lambda: None) -> UInt8[np.ndarray, "b f H W 3"]:
    """Every clip played from its first frame, under its keys and camera path, with a seed of its own.

    Args:
      clips: of whole chunks (`path.clip_length`); of `frames` the first is looked at. advance: called per chunk.
    """
    session, videos = world.session(), []
    for i, frames in enumerate(clips["frames"]):
        path = _path(clips, i)
        session.start(frames[0], str(clips["static"][i]), seed=i, intrinsics=path.intrinsics[0])
        videos.append(play_path(session, path, lambda _: advance()))
    session.close()
    return np.stack(videos)


def sample_long(
    world: World, clips: Rows, clip_frames: int, overlap: int, advance: Advance = lambda: None
) -> UInt8[np.ndarray, "b f H W 3"]:
    """Every clip sampled from its first frame, in windows of the length that was trained.

    Args:
      clip_frames, overlap: of a window, and of what it takes over; see `windows.Windows`. advance: called per window.
    """
    stride, total = world.config.codec.stride[0], clips["c2w"].shape[1]
    cut, videos = windows.Windows(total, clip_frames, overlap, stride), []
    for i, frames in enumerate(clips["frames"]):
        first, prompt = np.asarray(to_float(frames[0])), str(clips["static"][i])
        video = sample_windows(world, first, _path(clips, i), cut, prompt, seed=i, on_window=advance)
        videos.append(np.asarray(to_uint8(video)))
    return np.stack(videos)


def wander(world: World, clips: Rows, seconds: float, fps: float, advance: Advance = lambda: None) -> Clips:
    """Play for as long as wished from the clips' first frames, with keys held for a second or so at a time."""
    chunk, stride = world.config.causal.chunk, world.config.codec.stride[0]
    count = clip_length(round(seconds * fps) + 1, None, stride, chunk, pad=True)
    do, walks = world.config.keyboard, []
    for i in range(len(clips["frames"])):
        rng = np.random.default_rng(i)
        keys = np.zeros((count, len(keyboard.KEYS)), np.uint8)
        at = 1
        while at < count:
            held = int(rng.integers(8, 25))
            keys[at : at + held, keyboard.KEYS.index(rng.choice(["W", "W", "J", "L", "A", "D"]))] = 1
            at += held
        walks.append(keys)
    integrate = lambda keys: keyboard.integrate(
        keys, step=do.step_size, yaw_degrees=do.turn_rate, pitch_degrees=do.turn_rate
    )
    rows = {
        "frames": clips["frames"][:, :1],
        "keys": np.stack(walks),
        "c2w": np.stack([integrate(keys) for keys in walks]),
        "intrinsics": np.repeat(clips["intrinsics"][:, :1], count, axis=1),
        "static": clips["static"],
    }
    return as_clips(play(world, rows, advance), rows)
