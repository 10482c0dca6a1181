"""Draws docs/images/keys_to_path.png, the picture of docs/control.md: `python docs/figures/keys_to_path.py`."""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.patches import Polygon

from lingbot_jax.control import keyboard

TEXT = "w-16,wl-45,w-12,j-45,wd-14,wi-12,k-12,none-8"
IMAGE = pathlib.Path(__file__).resolve().parents[1] / "images" / "keys_to_path.png"
EVERY = 4  # video frames between view cones: one a latent frame
CONE = 0.17  # length of a view cone, world units
INK = "#333333"


def segments(keys):
    """(first row, last row, label) of every run of equal keys."""
    row = 1
    for token in keyboard.to_text(keys).split(","):
        name, frames = token.rsplit("-", 1)
        yield row, row + int(frames) - 1, name
        row += int(frames)


def draw_keys(axes, keys, colours):
    """A piano roll: one line a key, time to the right."""
    for number, (first, last, name) in enumerate(segments(keys)):
        axes.axvspan(first - 0.5, last + 0.5, color=colours[number], alpha=0.13, lw=0)
        axes.text(
            (first + last) / 2, -0.75, name, ha="center", va="bottom", fontsize=10, color=colours[number]
        )
        for key in np.flatnonzero(keys[first]):
            axes.barh(key, last - first + 1, left=first - 0.5, height=0.66, color=colours[number])
    axes.set_yticks(range(len(keyboard.KEYS)), keyboard.KEYS, family="monospace")
    axes.set_ylim(7.6, -1.5)
    axes.set_xlim(0, len(keys) - 0.5)
    axes.set_xlabel("row i of keys: held during the transition into frame i")
    axes.set_title(TEXT, family="monospace", fontsize=11, color=INK, pad=8)


def draw_path(axes, c2w, keys, colours):
    """The ground from above; a cone shows where the camera looks at each latent frame."""
    x, z = c2w[:, 0, 3], c2w[:, 2, 3]
    owner = np.zeros(len(keys), int)
    for number, (first, last, _) in enumerate(segments(keys)):
        owner[first : last + 1] = number
    points = np.stack([x, z], axis=-1)
    lines = LineCollection(
        np.stack([points[:-1], points[1:]], axis=1),
        array=owner[1:],
        cmap=ListedColormap(colours),
        clim=(-0.5, len(colours) - 0.5),
        lw=3.5,
        capstyle="round",
    )
    axes.add_collection(lines)
    for i in range(0, len(c2w), EVERY):
        forward, right = (axis[0, [0, 2]] for axis in keyboard.headings(c2w[i : i + 1, :3, :3]))
        tip = points[i] + CONE * forward
        corners = [points[i], tip + CONE / 2 * right, tip - CONE / 2 * right]
        colour = colours[owner[i]] if i else INK
        axes.add_patch(
            Polygon(corners, facecolor=(*to_rgb(colour), 0.12), edgecolor=colour, lw=0.9, zorder=1.5)
        )
    axes.plot(*points[0], "o", color=INK, ms=8, zorder=3)
    axes.plot(*points[-1], "s", color=INK, ms=8, zorder=3)
    axes.annotate("frame 0", points[0], (12, -4), textcoords="offset points", color=INK)
    axes.annotate(f"frame {len(keys) - 1}", points[-1], (12, -4), textcoords="offset points", color=INK)
    for number, (first, last, name) in enumerate(segments(keys)):
        moving, turning = keys[first, :4].any(), keys[first, [5, 7]].any()
        if moving or turning:  # looking up and down does not show from above
            place, offset = points[(first + last) // 2], (14, -14) if moving else (-20, 12)
            style = {"color": colours[number], "fontsize": 12, "weight": "bold"}
            axes.annotate(name, place, offset, textcoords="offset points", **style)
    axes.set_aspect("equal")
    axes.margins(0.1)
    axes.set_ylim(-0.2, None)
    axes.set_xlabel("x, right")
    axes.set_ylabel("z, forward (0.05 a frame)")
    axes.set_title("the path from above, one view cone a latent frame", fontsize=11, color=INK, pad=8)
    axes.grid(color="#e5e5e5", lw=0.8)
    axes.set_axisbelow(True)


def draw_angles(axes, c2w):
    """Yaw and pitch of the camera over time."""
    forward = c2w[:, :3, 2]
    yaw = np.degrees(np.unwrap(np.arctan2(forward[:, 0], forward[:, 2])))
    axes.plot(yaw, color=INK, lw=2, label="yaw: L +2, J -2 a frame")
    pitch = np.degrees(keyboard.elevation(c2w[:, :3, :3]))
    axes.plot(pitch, color="#888888", lw=2, ls=(0, (2, 1.5)), label="pitch: I +2, K -2 a frame")
    axes.set_xlim(0, len(c2w) - 0.5)
    axes.set_ylabel("degrees")
    axes.set_xlabel("frame")
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    axes.grid(color="#e5e5e5", lw=0.8)


def main():
    keys = keyboard.parse(TEXT)
    c2w = keyboard.integrate(keys)
    colours = list(plt.get_cmap("tab10").colors)
    colours[len(list(segments(keys))) - 1] = (0.5, 0.5, 0.5)  # `none`
    colours = colours[: len(list(segments(keys)))]
    figure = plt.figure(figsize=(12, 5.6), dpi=110, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1.3, 1], height_ratios=[1.5, 1])
    draw_keys(figure.add_subplot(grid[0, 0]), keys, colours)
    draw_angles(figure.add_subplot(grid[1, 0]), c2w)
    draw_path(figure.add_subplot(grid[:, 1]), c2w, keys, colours)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE)


if __name__ == "__main__":
    main()
