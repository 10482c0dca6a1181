"""Long videos of held-out clips by any world: played chunk after chunk, or sampled window after window."""

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

from lingbot_jax.control import keyboard
from lingbot_jax.evaluation.post_training import Clips
from lingbot_jax.evaluation.suite import Rows
from lingbot_jax.models.codec import to_float, to_uint8
from lingbot_jax.rollout import windows
from lingbot_jax.rollout.path import CameraPath
from lingbot_jax.rollout.sample import sample_clips
from lingbot_jax.worlds.clips import prepare
from lingbot_jax.worlds.world import World

Video = UInt8[np.ndarray, "f H W 3"]
Advance = Callable[[], None]


def steady(clips: Rows) -> Rows:
    """The clips in whose scene nothing changes: their first caption holds to their end."""
    keep = np.asarray(clips["scene"]) == np.asarray(clips["static"])
    return {name: values[keep] for name, values in clips.items()}


def as_clips(videos: UInt8[np.ndarray, "b f H W 3"], clips: Rows) -> Clips:
    """Videos with the camera paths of the clips that they follow."""
    return Clips(videos, clips["c2w"], clips["intrinsics"][:, 0])


def play(world: World, clips: Rows, advance: Advance = lambda: None) -> UInt8[np.ndarray, "b f H W 3"]:
    """Every clip played from its first frame, under its keys and camera path, with a seed of its own.

    Args:
      clips: of whole chunks: the codec's stride in time * (chunk * n - 1) + 1 frames. advance: called per chunk.
    """
    session, videos = world.session(), []
    for i in range(len(clips["frames"])):
        frames, keys, c2w = (clips[name][i] for name in ("frames", "keys", "c2w"))
        session.start(frames[0], str(clips["static"][i]), seed=i, intrinsics=clips["intrinsics"][i, 0])
        video, at = [], 0
        while at < len(frames):
            stop = at + session.transitions + (at == 0)
            video.append(session.step(keys[max(at, 1) : stop], c2w[at:stop]))
            at = stop
            advance()
        videos.append(np.concatenate(video))
    session.close()
    return np.stack(videos)


def sample_long(
    world: World, clips: Rows, clip_frames: int, overlap: int, advance: Advance = lambda: None
) -> UInt8[np.ndarray, "b f H W 3"]:
    """Every clip sampled from its first frame, in windows of the length that was trained.

    Args:
      clip_frames, overlap: of a window, and of what it takes over; see `windows.Windows`. advance: called per window.
    """
    stride, total = world.config.codec.stride[0], clips["frames"].shape[1]
    cut, videos = windows.Windows(total, clip_frames, overlap, stride), []
    for i in range(len(clips["frames"])):
        path = CameraPath(clips["c2w"][i], clips["intrinsics"][i], clips["keys"][i].astype(bool))

        def generate(known: np.ndarray, start: int, i: int = i, path: CameraPath = path) -> np.ndarray:
            part = path.window(start, clip_frames)
            shown = np.zeros((clip_frames, *known.shape[1:]), np.float32)
            shown[: len(known)] = known
            rows = {"frames": shown, "keys": part.keys, "c2w": part.c2w, "intrinsics": part.intrinsics}
            rows = {name: values[None] for name, values in rows.items()}
            latent = np.array([world.config.codec.latent_frames(len(known))])
            prepared = prepare(world.config, world.text, rows, latent, [str(clips["static"][i])])
            advance()
            return np.asarray(sample_clips(world, prepared, seed=i, indices=[start])[0])

        first = np.asarray(to_float(clips["frames"][i, 0]))
        videos.append(np.asarray(to_uint8(windows.extend(first, cut, generate))))
    return np.stack(videos)


def wander(world: World, clips: Rows, seconds: float, fps: float, advance: Advance = lambda: None) -> Clips:
    """Play for as long as wished from the clips' first frames, with keys held for a second or so at a time."""
    chunk, stride = world.config.causal.chunk, world.config.codec.stride[0]
    count = stride * (chunk * -(-round(seconds * fps) // (stride * chunk))) + stride * (chunk - 1) + 1
    do = world.config.keyboard
    rows = {"frames": [], "keys": [], "c2w": [], "intrinsics": [], "static": []}
    for i in range(len(clips["frames"])):
        rng = np.random.default_rng(i)
        keys = np.zeros((count, len(keyboard.KEYS)), np.uint8)
        at = 1
        while at < count:
            held = int(rng.integers(8, 25))
            keys[at : at + held, keyboard.KEYS.index(rng.choice(["W", "W", "J", "L", "A", "D"]))] = 1
            at += held
        c2w = keyboard.integrate(
            keys, step=do.step_size, yaw_degrees=do.turn_rate, pitch_degrees=do.turn_rate
        )
        frames = np.repeat(clips["frames"][i, :1], count, axis=0)
        intrinsics = np.repeat(clips["intrinsics"][i, :1], count, axis=0)
        made = (frames, keys, c2w, intrinsics, clips["static"][i])
        for name, value in zip(rows, made, strict=True):
            rows[name].append(value)
    stacked = {name: np.stack(values) for name, values in rows.items()}
    return as_clips(play(world, stacked, advance), stacked)
