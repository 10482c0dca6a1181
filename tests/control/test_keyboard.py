"""Keys, their text, and the poses they lead to. Oracles: a step-by-step walk with SciPy rotations, hand values."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from lingbot_jax.config import ConfigError
from lingbot_jax.control import keyboard

few = settings(max_examples=60, deadline=None, derandomize=True)
rows = st.lists(st.integers(0, 255), min_size=1, max_size=60)


def bits(numbers):
    """Bool [f 8] from one byte a frame."""
    return np.unpackbits(np.array(numbers, np.uint8)[:, None], axis=1).astype(bool)


def held(text):
    return keyboard.parse(text)


def one(letters, frames=1, **options):
    """The last pose after holding some keys."""
    return keyboard.integrate(held(f"{letters}-{frames}"), **options)[-1]


def walk(keys, start, step, yaw, pitch, limit):
    """The rule of docs/control.md applied one frame at a time, with SciPy."""
    c2w = [start.copy()]
    angle = np.degrees(np.arcsin(-start[1, 2]))
    for w, a, s, d, i, j, k, l in keys[1:].astype(int):
        up = (i - k) * pitch
        up = up if abs(angle + up) <= max(limit, abs(angle)) + 1e-6 else 0.0
        angle += up
        turn = Rotation.from_euler("y", (l - j) * yaw, degrees=True)
        rotation = (
            turn * Rotation.from_matrix(c2w[-1][:3, :3]) * Rotation.from_euler("x", up, degrees=True)
        ).as_matrix()
        forward, right = rotation[:, 2] * [1, 0, 1], rotation[:, 0] * [1, 0, 1]
        forward, right = forward / np.linalg.norm(forward), right / np.linalg.norm(right)
        pose = np.eye(4)
        pose[:3, :3] = rotation
        pose[:3, 3] = c2w[-1][:3, 3] + step * ((w - s) * forward + (d - a) * right)
        c2w.append(pose)
    return np.stack(c2w)


def level_start(x, y, z, yaw, pitch):
    start = np.eye(4)
    start[:3, :3] = Rotation.from_euler("YX", [yaw, pitch], degrees=True).as_matrix()
    start[:3, 3] = x, y, z
    return start


starts = st.builds(level_start, *[st.floats(-200, 200)] * 3, st.floats(-180, 180), st.floats(-80, 80))


def test_parse_reads_the_documented_example():
    keys = held("w-20,wl-12,none-8")
    assert keys.shape == (41, 8) and keys.dtype == bool
    names = ["".join(k for k, down in zip(keyboard.KEYS, row, strict=True) if down) for row in keys]
    assert names == [""] + ["W"] * 20 + ["WL"] * 12 + [""] * 8
    assert (held(" W-20 , Lw - 12,\nNONE-8") == keys).all()


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "character 1 = '': expected <keys>-<frames>"),
        ("w-20,wx-12", "character 6 = 'wx-12': unknown key 'X'; allowed: W A S D I J K L or none"),
        ("w-20, ww-12", "character 7 = 'ww-12': key 'W' is named twice"),
        ("w-20,,d-3", "character 6 = '': expected"),
        ("w-20,", "character 6 = '': expected"),
        ("w20", "character 1 = 'w20': expected"),
        ("w-0", "character 1 = 'w-0': the number of frames must be at least 1"),
        ("w--3", "character 1 = 'w--3': expected"),
        ("w-²", "character 1 = 'w-²': expected"),
        ("w-2.5", "character 1 = 'w-2.5': expected"),
        ("s-1,w-999999999", "character 5 = 'w-999999999': together more than 1000000 frames"),
        ("w-9999999999999", "character 1 = 'w-9999999999999': expected"),
    ],
)
def test_parse_names_position_and_token(text, said):
    with pytest.raises(ConfigError) as error:
        keyboard.parse(text)
    assert said in str(error.value) and "\n" not in str(error.value)


@few
@given(rows)
def test_text_round_trip(numbers):
    keys = bits([0, *numbers])
    assert (keyboard.parse(keyboard.to_text(keys)) == keys).all()


def test_text_of_no_transition_is_refused():
    with pytest.raises(ConfigError, match="at least 2"):
        keyboard.to_text(bits([0]))


@pytest.mark.parametrize(
    "letters, place, view",  # after one frame; x right, y down, z forward
    [
        ("w", [0, 0, 0.05], [0, 0, 1]),
        ("s", [0, 0, -0.05], [0, 0, 1]),
        ("a", [-0.05, 0, 0], [0, 0, 1]),
        ("d", [0.05, 0, 0], [0, 0, 1]),
        ("wd", [0.05, 0, 0.05], [0, 0, 1]),
        ("ws", [0, 0, 0], [0, 0, 1]),
        ("i", [0, 0, 0], [0, -np.sin(np.radians(2)), np.cos(np.radians(2))]),
        ("k", [0, 0, 0], [0, np.sin(np.radians(2)), np.cos(np.radians(2))]),
        ("j", [0, 0, 0], [-np.sin(np.radians(2)), 0, np.cos(np.radians(2))]),
        ("l", [0, 0, 0], [np.sin(np.radians(2)), 0, np.cos(np.radians(2))]),
        ("ijkl", [0, 0, 0], [0, 0, 1]),
        ("none", [0, 0, 0], [0, 0, 1]),
    ],
)
def test_each_key_does_what_the_table_says(letters, place, view):
    pose = one(letters)
    np.testing.assert_allclose(pose[:3, 3], place, atol=1e-15)
    np.testing.assert_allclose(pose[:3, 2], view, atol=1e-15)


def test_turning_comes_before_moving_and_looking_up_keeps_the_ground():
    np.testing.assert_allclose(
        one("wl")[:3, 3], 0.05 * np.array([np.sin(np.radians(2)), 0, np.cos(np.radians(2))]), atol=1e-15
    )
    c2w = keyboard.integrate(held("i-20,w-20"))
    np.testing.assert_allclose(c2w[-1, :3, 3], [0, 0, 1.0], atol=1e-14)
    np.testing.assert_allclose(c2w[-1, 1, 2], -np.sin(np.radians(40)), atol=1e-14)


def test_a_full_turn_comes_back():
    np.testing.assert_allclose(one("l", 180), np.eye(4), atol=1e-14)
    # Walking while turning draws a regular polygon with 180 sides of length 0.05.
    np.testing.assert_allclose(one("wl", 180), np.eye(4), atol=1e-14)


def test_pitch_stops_at_the_last_whole_step_and_comes_back():
    c2w = keyboard.integrate(held("i-60,k-1"))
    elevation = np.degrees(np.arcsin(-c2w[:, 1, 2]))
    np.testing.assert_allclose(elevation[42:61], 84, atol=1e-10)
    np.testing.assert_allclose(elevation[61], 82, atol=1e-10)
    np.testing.assert_allclose(np.degrees(np.arcsin(-one("i", 99, pitch_limit=84.0)[1, 2])), 84, atol=1e-10)
    # Three steps of 0.1 degrees reach a limit of 0.3, although 3 * 0.1 > 0.3 in binary.
    low = one("i", 9, pitch_degrees=0.1, pitch_limit=0.3)
    np.testing.assert_allclose(np.degrees(np.arcsin(-low[1, 2])), 0.3, atol=1e-9)
    beyond = level_start(0, 0, 0, 0, 88)
    np.testing.assert_allclose(one("i", 5, start=beyond), beyond, atol=1e-12)
    np.testing.assert_allclose(np.degrees(np.arcsin(-one("k", 5, start=beyond)[1, 2])), 78, atol=1e-9)


@few
@given(rows, starts)
def test_closed_form_equals_the_walk_frame_by_frame(numbers, start):
    keys = bits(numbers)
    sizes = {"step": 0.3, "yaw_degrees": 7.0, "pitch_degrees": 5.0, "pitch_limit": 60.0}
    ours = keyboard.integrate(keys, start, **sizes)
    assert ours.dtype == np.float64 and ours.shape == (len(keys), 4, 4)
    np.testing.assert_allclose(ours, walk(keys, start, *sizes.values()), atol=1e-11)


@few
@given(rows, rows, starts)
def test_chunks_continue_the_same_path(first, second, start):
    whole = keyboard.integrate(bits(first + second), start)
    head = keyboard.integrate(bits(first), start)
    tail = keyboard.integrate(bits([0, *second]), head[-1])
    np.testing.assert_allclose(np.concatenate([head, tail[1:]]), whole, atol=1e-11)


@few
@given(rows, starts)
def test_inverse_gives_the_path_again_and_the_keys_that_had_an_effect(numbers, start):
    keys = bits(numbers)
    keys[0] = False
    c2w = keyboard.integrate(keys, start)
    back = keyboard.keys_from_poses(c2w)
    np.testing.assert_allclose(keyboard.integrate(back, start), c2w, atol=1e-11)
    w, a, s, d, i, j, k, l = keys.T
    effective = np.stack([w & ~s, a & ~d, s & ~w, d & ~a, i & ~k, j & ~l, k & ~i, l & ~j], axis=1)
    refused = effective & ~back  # only a pitch key at the limit may be missing
    assert not (back & ~effective).any() and not refused[:, [0, 1, 2, 3, 5, 7]].any()
    angle = np.degrees(np.arcsin(-c2w[:, 1, 2]))
    assert (np.abs(angle[refused.any(1)]) > 85 - 2 - 1e-6).all()


def test_inverse_thresholds_are_read():
    c2w = keyboard.integrate(held("wli-4"))
    assert keyboard.keys_from_poses(c2w)[1:].sum() == 12
    assert not keyboard.keys_from_poses(c2w, move=0.06)[:, 0].any()
    assert not keyboard.keys_from_poses(c2w, yaw_degrees=2.5)[:, 7].any()
    assert not keyboard.keys_from_poses(c2w, pitch_degrees=2.5)[:, 4].any()


def test_inverse_is_independent_of_where_the_path_lies():
    keys = held("wl-9,d-3,sj-6,i-4,none-2")
    for yaw in (0, 91, 179.5, -120):
        start = level_start(165, -3, 40, yaw, 0)
        assert (keyboard.keys_from_poses(keyboard.integrate(keys, start)) == keys).all()


@pytest.mark.parametrize(
    "keys, said",
    [
        (np.zeros((3, 7)), "keys has shape (3, 7): must be [frames 8], columns W A S D I J K L"),
        (np.zeros((0, 8)), "keys has shape (0, 8)"),
        ([[0] * 8, [0, 0, 2, 0, 0, 0, 0, 0]], "keys[1].S = np.int64(2): must be 0 or 1"),
        ([[float("nan")] * 8], "keys[0].W"),
    ],
)
def test_check_names_frame_and_key(keys, said):
    with pytest.raises(ConfigError) as error:
        keyboard.check(keys)
    assert said in str(error.value)
