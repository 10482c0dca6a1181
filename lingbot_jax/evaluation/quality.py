"""Whether generated video keeps its looks: sharpness, brightness and contrast, each against recorded video.

All numbers are of *sets* of frames, averaged before they are compared, so that the recorded set need not show the same
places: beyond the length of the recordings there is no truth, but there are recordings of the same world.

Sharpness is the size of edges in proportion to contrast, without those that a codec makes. A codec of patches puts
errors that do not agree across the borders of patches: steps on a grid, which any measure of gradients, or of the
Laplacian, takes for detail. Real edges do not know the grid. So the energy of the gradients, the mean square
difference of neighbouring pixels, is taken by its place:

    inside    of neighbours in the same patch
    border    of neighbours across a border
    excess    how much a *typical* difference is larger across borders than inside, beyond what it is in recorded video
    share     inside / (inside + excess)

    going on  of gradients on either side of a border that they run across: mean product of both
    edges     inside or going on, whichever is the smaller part of what it is in recorded video

and sharpness is share times the root of edges / (variance of a frame), over the latter of recorded video. Noise has
gradients, but none that go on, and is not sharp. What is typical is read off medians, as the mean square of a normal
distribution with this median: a few edges of the scene that happen to stand on the grid weigh nothing there.

Errors that patches make independently show across borders with the energy of both sides, inside with less: a pattern
of k half waves per patch of n pixels has about (pi k / n)^2 / 4 of that. So for k < n / 2 the share falls by more than
the root rises, until the errors' gradients are several times the scene's.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

Videos = UInt8[np.ndarray, "*b f H W 3"]
Frames = Float[np.ndarray, "n H W"]
_MEDIAN = 0.4549  # of the square of a standard normal variable
_LUMA = np.array([0.299, 0.587, 0.114], np.float32) / 255


class Looks(NamedTuple):
    """Of generated video against recorded one: 1, 0 and 1 where they look the same.

    Attributes:
      sharpness: share of the recorded sharpness; falls with blur and with errors on the codec's grid.
      brightness: mean luma less that of the recorded one, of a range of 1.
      contrast: share of the recorded standard deviation of luma within a frame, of areas of two by two patches.
    """

    sharpness: float
    brightness: float
    contrast: float


def luma(videos: Videos) -> Frames:
    """All frames of 8-bit videos in grey, [0, 1]."""
    return (videos @ _LUMA).reshape(-1, *videos.shape[-3:-1])


def _gradients(frames: Frames, axis: int, step: int) -> tuple[float, float]:
    """Energies of the differences of neighbours along an axis: mean inside patches, and typical excess at borders."""
    energy = np.square(np.diff(frames, axis=axis))
    border = np.arange(1, energy.shape[axis] + 1) % step == 0
    inside, across = (np.compress(where, energy, axis) for where in (~border, border))
    return float(inside.mean()), float(np.median(across) - np.median(inside)) / _MEDIAN


def _going_on(frames: Frames, axis: int, step: int) -> float:
    """Mean product of neighbours' differences along an axis, on either side of a border that the other axis crosses."""
    across = 3 - axis
    difference = np.diff(frames, axis=axis)
    before = np.arange(step - 1, difference.shape[across] - 1, step)
    return float((difference.take(before, across) * difference.take(before + 1, across)).mean())


def sharpness(videos: Videos, recorded: Videos, grid: tuple[int, int] = (8, 8)) -> float:
    """Share of the sharpness of recorded video, from 0; 1 is equal (see above).

    Args:
      grid: height and width in pixels of the codec's patches, at least 2 and at most half a frame.

    Raises:
      ValueError: a grid that a frame does not hold twice, or video without any contrast.
    """
    height, width = videos.shape[-3:-1]
    if not (2 <= grid[0] <= height // 2 and 2 <= grid[1] <= width // 2):
        raise ValueError(f"grid = {grid}: a frame of {height} x {width} must hold it twice")
    ours, truth = luma(videos), luma(recorded)
    variance, true_variance = (x.var(axis=(1, 2)).mean() for x in (ours, truth))
    if not min(variance, true_variance) > 0:
        raise ValueError("videos without any contrast have no sharpness")
    found = [
        [_gradients(x, axis, step) for axis, step in ((1, grid[0]), (2, grid[1]))] for x in (ours, truth)
    ]
    inside, true_inside = (sum(energy for energy, _ in axes) for axes in found)
    excess = sum(max(own - true, 0.0) for (_, own), (_, true) in zip(*found, strict=True))
    on, true_on = (sum(_going_on(x, axis, grid[2 - axis]) for axis in (1, 2)) for x in (ours, truth))
    edges = inside / true_inside
    if true_on > 0:  # recorded noise has nothing that goes on
        edges = min(edges, max(on, 0.0) / true_on)
    return float(np.sqrt(edges * true_variance / variance) * inside / (inside + excess))


def _contrast(frames: Frames, grid: tuple[int, int]) -> float:
    """Mean standard deviation, within a frame, of the means of areas of two by two patches: neither fine detail nor
    errors of patches are part of it."""
    tall, wide = 2 * grid[0], 2 * grid[1]
    rows, columns = frames.shape[1] // tall, frames.shape[2] // wide
    means = frames[:, : rows * tall, : columns * wide].reshape(-1, rows, tall, columns, wide).mean((2, 4))
    return float(means.std(axis=(1, 2)).mean())


def looks(videos: Videos, recorded: Videos, grid: tuple[int, int] = (8, 8)) -> Looks:
    """Sharpness, brightness and contrast of a set of frames against a recorded set.

    Raises:
      ValueError: see sharpness.
    """
    ours, truth = luma(videos), luma(recorded)
    brightness = float(ours.mean() - truth.mean())
    return Looks(
        sharpness(videos, recorded, grid), brightness, _contrast(ours, grid) / _contrast(truth, grid)
    )


def drift(
    videos: Videos, recorded: Videos, fps: float, grid: tuple[int, int] = (8, 8), start: float = 2.0
) -> Looks:
    """How far the looks of long play go from what they were at `start` seconds, at most, in windows of `start` seconds.

    Returns:
      largest departure from the first window, which ends at `start`: relative of sharpness and contrast, absolute of
      brightness. 0: nothing drifts.

    Raises:
      ValueError: less than two windows, or see sharpness.
    """
    length = round(start * fps)
    count = videos.shape[-4] // length
    if count < 2:
        raise ValueError(f"videos of {videos.shape[-4]} frames: drift needs 2 windows of {length} frames")
    windows = np.array(
        [looks(videos[..., i * length : (i + 1) * length, :, :, :], recorded, grid) for i in range(count)]
    )
    departure = np.abs(windows - windows[0])
    first = np.maximum(np.array([windows[0, 0], 1.0, windows[0, 2]]), 1e-6)
    return Looks(*(departure.max(axis=0) / first).tolist())
