"""Recorded-like videos of rooms seen from a moving camera, and the faults of generated ones, made from nothing."""

import cv2
import numpy as np

from lingbot_jax.control import keyboard

HEIGHT, WIDTH = 48, 64
INTRINSICS = np.array([32.0, 32.0, 32.0, 24.0])
ROOM = np.array([4.0, 1.5, 4.0])  # half its size


def path(text: str, start_yaw: float = 0.0) -> np.ndarray:
    """Poses of keys in their text form, in the middle of the room: turns of 3 degrees a frame."""
    start = np.eye(4)
    start[:3, :3] = keyboard.rotation_y(start_yaw)
    return keyboard.integrate(keyboard.parse(text), start, 0.05, 3.0, 3.0)


def textures(style: str, seed: int) -> np.ndarray:
    """Six walls `6 64 64 3` in [0, 1]: `game`, noisy bricks as old games have; `rendered`, flat fields of colour."""
    rng = np.random.default_rng(seed)
    base = rng.uniform(0.25, 0.75, (6, 1, 1, 3))
    cells = rng.uniform(-0.25, 0.25, (6, 8, 8, 1)).repeat(8, 1).repeat(8, 2)
    if style == "rendered":
        return np.clip(base + cells, 0, 1)
    joints = np.ones((64, 64, 1))
    joints[::8] = joints[:, ::8] = 0.6
    return np.clip((base + 0.5 * cells + rng.normal(0, 0.08, (6, 64, 64, 1))) * joints, 0, 1)


def render(c2w: np.ndarray, style: str, seed: int = 0, fine: int = 2) -> np.ndarray:
    """The room along a path `f 4 4`: `f 48 64 3` uint8, every pixel the mean of fine x fine rays."""
    walls = textures(style, seed)
    y, x = (np.mgrid[: HEIGHT * fine, : WIDTH * fine] + 0.5) / fine
    rays = np.stack([(x - 32) / 32, (y - 24) / 32, np.ones_like(x)], -1).reshape(-1, 3)
    frames = []
    for pose in c2w:
        direction, origin = rays @ pose[:3, :3].T, pose[:3, 3]
        far = (np.sign(direction) * ROOM - origin) / np.where(direction == 0, 1e-9, direction)
        axis = far.argmin(1)
        near = np.take_along_axis(far, axis[:, None], 1)
        place = (origin + near * direction) / ROOM / 2 + 0.5
        u, v = place[:, [1, 0, 0]], place[:, [2, 2, 1]]
        pick = lambda p, a=axis: np.clip(np.take_along_axis(p, a[:, None], 1)[:, 0] * 64, 0, 63).astype(int)
        side = np.take_along_axis(direction, axis[:, None], 1)[:, 0] > 0
        colour = walls[2 * axis + side, pick(u), pick(v)]
        picture = colour.reshape(HEIGHT, fine, WIDTH, fine, 3).mean((1, 3))
        frames.append(picture)
    return (np.stack(frames) * 255).round().astype(np.uint8)


def blurred(videos: np.ndarray, sigma: float = 1.0) -> np.ndarray:
    flat = videos.reshape(-1, *videos.shape[-3:])
    return np.stack([cv2.GaussianBlur(x, (0, 0), sigma) for x in flat]).reshape(videos.shape)


def with_block_noise(videos: np.ndarray, waves: int, size: float = 10.0, hold: int = 4) -> np.ndarray:
    """Errors of a codec of 8 x 8 patches: in each its own cosines of fewer than `waves` half waves, drawn anew every
    `hold` frames; `size` is their standard deviation in grey levels."""
    rng = np.random.default_rng(0)
    b, f = videos.shape[:2]
    basis = np.cos(np.pi * np.arange(waves)[:, None] * (np.arange(8) + 0.5) / 8)
    grid = rng.normal(size=(b, -(-f // hold), HEIGHT // 8, WIDTH // 8, waves, waves))
    noise = np.einsum("bfijkl,ky,lx->bfiyjx", grid, basis, basis).reshape(b, -1, HEIGHT, WIDTH)
    noise = (noise * size / noise.std()).repeat(hold, 1)[:, :f, ..., None]
    return np.clip(videos + noise, 0, 255).astype(np.uint8)


def smeared(videos: np.ndarray) -> np.ndarray:
    """What a patch codec with one mean and two slopes per patch leaves: blurred within patches, torn between them."""
    basis, _ = np.linalg.qr(
        np.stack([np.ones(64), np.tile(np.arange(8) - 3.5, 8), np.repeat(np.arange(8) - 3.5, 8)], 1)
    )
    b, f = videos.shape[:2]
    patches = videos.reshape(b, f, HEIGHT // 8, 8, WIDTH // 8, 8, 3).transpose(0, 1, 2, 4, 6, 3, 5)
    kept = patches.reshape(*patches.shape[:5], 64) @ basis @ basis.T
    kept = kept.reshape(patches.shape).transpose(0, 1, 2, 5, 3, 6, 4).reshape(videos.shape)
    return np.clip(kept, 0, 255).astype(np.uint8)
