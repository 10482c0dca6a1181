"""A video along a camera path, as long as the path: sampled window by window, or played chunk after chunk."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8

from lingbot_jax.rollout import windows
from lingbot_jax.rollout.path import CameraPath
from lingbot_jax.rollout.sample import sample_clips
from lingbot_jax.rollout.session import Session
from lingbot_jax.worlds.clips import prepare
from lingbot_jax.worlds.config import SampleConfig
from lingbot_jax.worlds.world import World


def sample_windows(
    world: World,
    first: Float[np.ndarray, "H W 3"],
    path: CameraPath,
    cut: windows.Windows,
    prompt: str,
    sample: SampleConfig | None = None,
    *,
    seed: int = 0,
    on_step: Callable[[], None] | None = None,
    on_window: Callable[[], None] = lambda: None,
) -> Float[np.ndarray, "f H W 3"]:
    """The video in [-1, 1] whose first frame is `first`.

    Args:
      sample: None: as the world samples. on_step: see `sample_clips`. on_window: called before each window.
    """
    clip_frames = cut.clip_frames

    def generate(known: np.ndarray, start: int) -> np.ndarray:
        on_window()
        part = path.window(start, clip_frames)
        shown = np.zeros((clip_frames, *first.shape), np.float32)
        shown[: len(known)] = known
        rows = {"frames": shown, "keys": part.keys, "c2w": part.c2w, "intrinsics": part.intrinsics}
        latent = np.array([world.config.codec.latent_frames(len(known))])
        clips = prepare(world.config, world.text, {n: row[None] for n, row in rows.items()}, latent, [prompt])
        return sample_clips(world, clips, sample, seed=seed, indices=[start], on_step=on_step)[0]

    return windows.extend(first, cut, generate)


def play_path(
    session: Session,
    path: CameraPath,
    advance: Callable[[int], None],
    before: Callable[[int], None] = lambda at: None,
) -> UInt8[np.ndarray, "f H W 3"]:
    """Plays a session that has just started along a path of whole chunks.

    Args:
      advance: called with the frames of each chunk. before: called before each chunk with the frames there are.
    """
    at, video = 0, []
    while at < len(path):
        before(at)
        stop = at + session.transitions + (at == 0)
        video.append(session.step(path.keys[max(at, 1) : stop], path.c2w[at:stop]))
        advance(stop - at)
        at = stop
    return np.concatenate(video)
