"""Procedural paths do what the paper says of them; imported paths keep their jitter."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from lingbot_jax.config import ConfigError
from lingbot_jax.control import keyboard, poses, trajectories

few = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def rng(seed=0):
    return np.random.default_rng(seed)


def start(yaw=0.0, pitch=0.0, at=(4.0, -1.0, 2.0)):
    out = np.eye(4)
    out[:3, :3] = Rotation.from_euler("YX", [yaw, pitch], degrees=True).as_matrix()
    out[:3, 3] = at
    return out


def yaw_of(c2w):
    return np.unwrap(np.arctan2(c2w[:, 0, 2], c2w[:, 2, 2]))


@pytest.mark.parametrize("kind", sorted(trajectories.PROCEDURAL))
@few
@given(seed=seeds, yaw=st.floats(-180, 180), frames=st.integers(60, 200))
def test_every_procedural_path_is_sound(kind, seed, yaw, frames):
    make = trajectories.PROCEDURAL[kind]
    path = make(rng(seed), frames, start(yaw, 10))
    assert path.c2w.shape == (frames, 4, 4) and path.c2w.dtype == np.float64
    poses.validate(path.c2w)
    np.testing.assert_allclose(path.c2w[0], start(yaw, 10), atol=1e-12)
    np.testing.assert_allclose(path.c2w[:, 1, 3], -1.0, atol=1e-12)  # stays on the ground
    np.testing.assert_allclose(path.c2w[:, 1, 2], path.c2w[0, 1, 2], atol=1e-12)  # keeps its tilt
    assert path.keys.shape == (frames, 8) and not path.keys[0].any() and path.keys[1:].any(1).mean() > 0.9
    again = make(rng(seed), frames, start(yaw, 10))
    np.testing.assert_array_equal(again.c2w, path.c2w)
    # The same draw from another start is the same path seen from there.
    other = make(rng(seed), frames, start(0, 10, at=(0, -1, 0)))
    np.testing.assert_allclose(
        poses.relative(other.c2w, "first"), poses.relative(path.c2w, "first"), atol=1e-9
    )


@few
@given(seeds)
def test_rectangles_close_and_vary_in_scale(seed):
    path = trajectories.rectangle(rng(seed), 2000, sides=(0.5, 2.0), degrees=7.0)
    np.testing.assert_allclose(keyboard.integrate(path.keys, yaw_degrees=90 / 13), path.c2w, atol=1e-12)
    walking = path.keys[:, 0]
    starts = np.flatnonzero(np.diff(walking.astype(int)) == 1)
    first, second = np.diff(starts)[:2]  # frames of a side and its corner
    lap = 2 * (first + second)
    np.testing.assert_allclose(
        path.c2w[lap::lap], np.tile(np.eye(4), (len(path.c2w[lap::lap]), 1, 1)), atol=1e-9
    )
    sides = (np.array([first, second]) - 13) * keyboard.STEP
    assert (sides >= 0.5 - 0.026).all() and (sides <= 2.0 + 0.026).all()
    corners = path.c2w[starts[:4], :3, 3]
    np.testing.assert_allclose(np.linalg.norm(np.diff(corners, axis=0), axis=-1), sides[[0, 1, 0]], atol=1e-9)


@few
@given(seeds, st.integers(1, 3))
def test_turns_are_whole_circles_at_varying_speed(seed, count):
    path = trajectories.turns(rng(seed), 161, start(), count=(count, count), variation=0.6)
    yaw = yaw_of(path.c2w)
    np.testing.assert_allclose(abs(yaw[-1] - yaw[0]), 2 * np.pi * count, atol=1e-9)
    np.testing.assert_allclose(path.c2w[-1], path.c2w[0], atol=1e-9)
    np.testing.assert_array_equal(np.ptp(path.c2w[:, :3, 3], axis=0), 0)
    speed = np.diff(yaw) / (2 * np.pi * count / 160) * np.sign(yaw[-1] - yaw[0])
    assert speed.min() > 0.4 - 1e-6 and speed.max() < 1.6 + 1e-6 and np.ptp(speed) > 0.1
    assert (path.keys[1:].sum(0) > 0).sum() == 1 and path.keys[1:].any(1).all()
    steady = trajectories.turns(rng(seed), 161, variation=0.0)
    np.testing.assert_allclose(np.diff(yaw_of(steady.c2w), n=2), 0, atol=1e-9)


@few
@given(seeds)
def test_waypoints_look_back_where_they_came_from(seed):
    path = trajectories.waypoints(rng(seed), 900, extent=1.5)
    place = path.c2w[:, [0, 2], 3]
    assert np.linalg.norm(place, axis=-1).max() <= 1.5 + 1e-9
    speed = np.linalg.norm(np.diff(place, axis=0), axis=-1)
    assert speed.max() <= keyboard.STEP + 1e-9
    assert np.degrees(np.abs(np.diff(yaw_of(path.c2w)))).max() <= keyboard.DEGREES + 1e-9
    view = path.c2w[:, [0, 2], 2]
    walking = np.flatnonzero(speed > 0.99 * keyboard.STEP)
    ahead = np.sum(np.diff(place, axis=0)[walking] * view[walking], axis=-1)
    np.testing.assert_allclose(ahead, speed[walking], atol=1e-9)  # faces where it goes
    # Between two walks it stands still and at some frame faces back along the first of them.
    gaps = np.flatnonzero(np.diff(walking) > 10)
    assert len(gaps) >= 2
    for g in gaps:
        came, stand = view[walking[g]], view[walking[g] + 1 : walking[g + 1]]
        assert (stand @ came).min() < -np.cos(np.radians(keyboard.DEGREES))


def hand_held(n=50, seed=0):
    """A recording with jitter of position and tilt, near (100, -50, 30), facing about 40 degrees right."""
    r = rng(seed)
    out = np.tile(np.eye(4), (n, 1, 1))
    angles = np.stack([40 + np.linspace(0, 60, n), r.normal(0, 2, n), r.normal(0, 2, n)], axis=-1)
    out[:, :3, :3] = Rotation.from_euler("YXZ", angles, degrees=True).as_matrix()
    along = np.cumsum(r.uniform(0.0, 0.2, n))
    out[:, :3, 3] = np.stack([100 + along, -50 + r.normal(0, 0.02, n), 30 + along], axis=-1)
    return out


def test_recorded_paths_keep_their_jitter():
    recording = hand_held()
    path = trajectories.recorded(recording, 50, start(90))
    ours, theirs = poses.relative(path.c2w, "previous"), poses.relative(recording, "previous")
    np.testing.assert_allclose(ours, theirs, atol=1e-9)  # the same motion, step by step
    np.testing.assert_allclose(path.c2w[0, :3, 3], start(90)[:3, 3], atol=1e-12)
    np.testing.assert_allclose(yaw_of(path.c2w)[0], np.radians(90), atol=1e-9)
    np.testing.assert_allclose(path.c2w[:, 1, 2], recording[:, 1, 2], atol=1e-12)  # its tilt stays upright


def test_recorded_paths_are_scaled_and_timed():
    recording = hand_held()
    path = trajectories.recorded(recording, 33, reach=2.5)
    np.testing.assert_allclose(np.linalg.norm(path.c2w[:, :3, 3], axis=-1).max(), 2.5, atol=1e-12)
    assert path.keys[1:, 3].any() or path.keys[1:, 0].any()
    # Twice as slow in its second half: the middle of the time is two thirds of the first half ... in frames.
    times = np.concatenate([np.arange(25), 24 + 2 * np.arange(1, 26)]).astype(float)
    timed = trajectories.recorded(recording, 75, timestamps=times)
    even = trajectories.recorded(recording, 50)
    np.testing.assert_allclose(timed.c2w[:25], even.c2w[:25], atol=1e-9)
    np.testing.assert_allclose(timed.c2w[24::2], even.c2w[24:], atol=1e-9)


def test_collisions_are_redrawn_and_give_up():
    r, seen = rng(), []

    def free(c2w):
        seen.append(c2w)
        return c2w[:, 0, 3].max() < 0.2 and len(seen) > 2

    path = trajectories.collision_free(lambda: trajectories.waypoints(r, 65), free)
    assert path.c2w is seen[-1] and path.c2w[:, 0, 3].max() < 0.2 and len(seen) > 2
    with pytest.raises(ConfigError, match="attempts = 3"):
        trajectories.collision_free(lambda: trajectories.turns(r, 65), lambda c2w: False, attempts=3)


@pytest.mark.parametrize("make", trajectories.PROCEDURAL.values())
def test_seeds_give_different_paths(make):
    paths = [make(rng(seed), 400).c2w for seed in range(5)]
    assert all(np.abs(a - b).max() > 0.01 for i, a in enumerate(paths) for b in paths[:i])


def test_one_frame_is_the_start():
    for make in trajectories.PROCEDURAL.values():
        np.testing.assert_allclose(make(rng(), 1, start(30)).c2w, start(30)[None], atol=1e-12)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: trajectories.rectangle(rng(), 0), "frames = 0"),
        (lambda: trajectories.rectangle(rng(), 9, sides=(2.0, 1.0)), "sides = (2.0, 1.0)"),
        (lambda: trajectories.rectangle(rng(), 9, step=0.0), "step = 0.0"),
        (lambda: trajectories.turns(rng(), 9, count=(0, 1)), "count = (0, 1)"),
        (lambda: trajectories.turns(rng(), 9, variation=1.0), "variation = 1.0"),
        (lambda: trajectories.turns(rng(), 6, count=(3, 3)), "frames = 6: too few for 3 circles"),
        (lambda: trajectories.waypoints(rng(), 9, degrees=-1.0), "degrees = -1.0"),
        (lambda: trajectories.recorded(2 * hand_held(), 9), "recording[0]"),
        (lambda: trajectories.recorded(hand_held(), 9, timestamps=np.zeros(50)), "must be 50 increasing"),
        (lambda: trajectories.recorded(start()[None], 9, reach=1.0), "never moves"),
    ],
)
def test_refusals(call, said):
    with pytest.raises(ConfigError) as error:
        call()
    assert said in str(error.value) and "\n" not in str(error.value)
