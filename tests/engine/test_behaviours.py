"""Keys and plans in a room that we draw ourselves: no game needed."""

import numpy as np
import pytest

from lingbot_jax.control.keyboard import integrate
from lingbot_jax.engine.collect.behaviours import BEHAVIOURS
from lingbot_jax.engine.collect.source import camera_to_world
from lingbot_jax.engine.collect.walk import Pose, Spot, Walker, hold, reverse

STEP, YAW = 5.0, 3.0


class Room:
    """A square room of half width 128, a pillar in the middle, and a corridor to the east through a door."""

    doors = (Spot(144.0, 0.0, 0.0),)
    landmarks = (Spot(0.0, 0.0),)

    def __init__(self):
        self.asked = []

    def enter(self, x, y):
        self.asked.append((x, y))
        in_room = abs(x) <= 112 and abs(y) <= 112
        in_corridor = 0 <= x <= 400 and abs(y) <= 40
        return 0.0 if (in_room or in_corridor) and max(abs(x), abs(y)) >= 40 else None

    def move(self, start, x, y):
        return self.enter(x, y)

    def spawn(self, rng):
        return tuple(rng.uniform(-128, 128, 2))


def walker():
    return Walker(Room(), STEP, YAW)


def cameras(poses):
    return np.array([[p.x, p.y, p.z + 41.0, p.angle] for p in poses])


def test_free_keys_move_as_the_keyboard_does():
    """The walker in Doom's axes and `control.keyboard` in OpenCV's agree on every key, through the remap."""

    class Open(Room):
        def move(self, start, x, y):
            return 0.0

    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2, (200, 8)).astype(np.uint8)
    keys[:, [4, 6]] = 0
    start = Pose(30.0, -70.0, 0.0, 72.0)
    poses = [start, *Walker(Open(), STEP, YAW).follow(start, keys)[0]]
    ours = camera_to_world(cameras(poses), 0.05 / STEP)
    rows = np.concatenate([np.zeros((1, 8), np.uint8), keys])
    np.testing.assert_allclose(ours, integrate(rows, ours[0], step=0.05, yaw_degrees=YAW), atol=1e-9)


def test_blocked_moves_turn_but_stay():
    start = Pose(110.0, 100.0, 0.0, 0.0)
    pose, blocked = walker().advance(start, hold("WJ", 1)[0])
    assert blocked and pose == Pose(110.0, 100.0, 0.0, 3.0)
    pose, blocked = walker().advance(start, hold("S", 1)[0])
    assert not blocked and pose == Pose(105.0, 100.0, 0.0, 0.0)


def test_reverse_undoes():
    rng = np.random.default_rng(1)
    keys = rng.integers(0, 2, (20, 8)).astype(np.uint8)

    class Open(Room):
        def move(self, start, x, y):
            return 0.0

    start = Pose(1.0, 2.0, 0.0, 33.0)
    end = Walker(Open(), STEP, YAW).follow(start, np.concatenate([keys, reverse(keys)]))[0][-1]
    np.testing.assert_allclose(end, start, atol=1e-9)


@pytest.mark.parametrize("frames", [1, 8, 32, 80])
@pytest.mark.parametrize("name", sorted(BEHAVIOURS))
def test_plans_are_pure_and_complete(name, frames):
    for seed in range(6):
        plans = [BEHAVIOURS[name](np.random.default_rng(seed), walker(), frames, 8) for _ in range(2)]
        (pose, keys), (pose_again, keys_again) = plans
        assert keys.shape == (frames, 8) and keys.dtype == np.uint8 and keys.max(initial=0) <= 1
        assert pose == pose_again and (keys == keys_again).all()
        assert not keys[:, [4, 6]].any(), "the engine shears instead of pitching"
        assert Room().enter(pose.x, pose.y) is not None


def plans(name, frames=32, seeds=24):
    for seed in range(seeds):
        w = walker()
        pose, keys = BEHAVIOURS[name](np.random.default_rng(seed), w, frames, 8)
        yield keys, [pose, *w.follow(pose, keys)[0]], w.follow(pose, keys)[1]


def test_loops_return_to_their_start():
    moved = 0
    for _, poses, blocked in plans("loop_roaming"):
        assert blocked == 32
        np.testing.assert_allclose(poses[-1], poses[0], atol=1e-6)
        moved += max(np.hypot(p.x - poses[0].x, p.y - poses[0].y) for p in poses) > 20
    assert moved > 12, "most loops go somewhere"


def test_transitions_go_through_the_door():
    crossed = [(p[0].x - 144) * (p[-1].x - 144) < 0 for _, p, _ in plans("transition_navigation")]
    assert np.mean(crossed) > 0.9


def test_sightseeing_circles_the_landmark_looking_at_it():
    circles = 0
    for keys, poses, _ in plans("sightseeing"):
        if not keys[:, :4].any():
            continue
        circles += 1
        x, y = np.array([p.x for p in poses]), np.array([p.y for p in poses])
        radius = np.hypot(x, y)
        np.testing.assert_allclose(radius, radius[0], atol=1e-6)
        bearing = np.degrees(np.arctan2(-y, -x))
        off = (np.array([p.angle for p in poses]) - bearing + 180) % 360 - 180
        assert np.abs(off).max() < 4.6
    assert circles > 12


def test_stationary_and_backward():
    for keys, poses, _ in plans("stationary_360", frames=120, seeds=4):
        assert not keys[:, :4].any() and abs(poses[-1].angle - poses[0].angle) % 360 < 1e-6
        assert len({round(p.angle, 3) for p in poses}) == 120, "the whole circle"
    for keys, poses, _ in plans("stationary_fixed", seeds=4):
        assert not keys.any() and len(set(poses)) == 1
    for keys, *_ in plans("backward_navigation", seeds=8):
        assert not keys[:, 0].any() and keys[:, 2].mean() > 0.3


def test_keys_are_held():
    for keys, *_ in plans("free_navigation", frames=80, seeds=8):
        changes = np.flatnonzero((np.diff(keys.astype(int), axis=0) != 0).any(axis=1)) + 1
        runs = np.diff([0, *changes, 80])
        assert (runs[:-1] >= 6).all()
