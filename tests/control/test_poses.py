"""Pose arithmetic against closed forms and matrix products, its invariances, and what it refuses."""

import io
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg
from scipy.spatial.transform import Rotation

from lingbot_jax.config import ConfigError
from lingbot_jax.control import poses

few = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def path(seed, frames=9, spread=1.0, turn=2.0, centre=0.0):
    """Random rigid poses [f 4 4]; `turn`: radians between neighbours at most."""
    rng = np.random.default_rng(seed)
    steps = Rotation.from_rotvec(rng.uniform(-1, 1, (frames, 3)) * turn / np.sqrt(3))
    rotation = Rotation.random(rng=rng)
    out = np.tile(np.eye(4), (frames, 1, 1))
    for i, step in enumerate(steps):
        rotation = rotation * step
        out[i, :3, :3] = rotation.as_matrix()
    out[:, :3, 3] = centre + spread * rng.standard_normal((frames, 3))
    return out


def rigid(seed):
    return path(seed, 1, 5.0)[0]


@pytest.mark.parametrize("seed", range(3))
def test_interpolation_turns_at_constant_speed_about_one_axis(seed):
    """Against powers of the rotation between two frames, as matrices (no quaternions)."""
    c2w = path(seed)
    at = np.append(np.random.default_rng(seed).uniform(0, 8, 5), [0, 3, 8])
    ours = poses.interpolate(c2w, at)
    for where, pose in zip(at, ours, strict=True):
        low = min(int(where), 7)
        between = linalg.logm(c2w[low, :3, :3].T @ c2w[low + 1, :3, :3])
        turned = c2w[low, :3, :3] @ linalg.expm((where - low) * between.real)
        np.testing.assert_allclose(pose[:3, :3], turned, atol=1e-7)
    for axis in range(3):
        np.testing.assert_allclose(ours[:, axis, 3], np.interp(at, np.arange(9), c2w[:, axis, 3]), atol=1e-12)
    poses.validate(ours)


@few
@given(seeds, st.sampled_from([0.0, 1e-9, 1e-4, 1.0, np.pi - 1e-3]))
def test_slerp_keeps_digits_for_tiny_and_for_almost_half_turns(seed, angle):
    rng = np.random.default_rng(seed)
    axis = rng.standard_normal(3)
    ends = Rotation.from_rotvec([np.zeros(3), axis / np.linalg.norm(axis) * angle])
    c2w = np.tile(np.eye(4), (2, 1, 1))
    c2w[:, :3, :3] = (Rotation.random(rng=rng) * ends).as_matrix()
    middle = Rotation.from_matrix(poses.interpolate(c2w, np.array([0.25]))[:, :3, :3])
    turned = (Rotation.from_matrix(c2w[:1, :3, :3]).inv() * middle).magnitude()
    np.testing.assert_allclose(turned, 0.25 * angle, atol=2e-15 + 1e-9 * angle)


def test_resample_takes_every_fourth_frame():
    c2w = path(1, frames=33)
    np.testing.assert_allclose(poses.resample(c2w, 9), c2w[::4], atol=1e-12)
    np.testing.assert_allclose(poses.resample(c2w, 1), c2w[:1], atol=1e-12)
    np.testing.assert_allclose(poses.resample(c2w[:1], 3), c2w[[0, 0, 0]], atol=1e-12)


@few
@given(seeds)
def test_invert(seed):
    c2w = path(seed, centre=100.0)
    np.testing.assert_allclose(poses.invert(c2w), np.linalg.inv(c2w), atol=1e-10)
    np.testing.assert_allclose(poses.invert(poses.invert(c2w)), c2w, atol=1e-10)


@few
@given(seeds)
def test_relative_equals_matrix_products(seed):
    c2w = path(seed)
    first = poses.relative(c2w, "first")
    np.testing.assert_allclose(first, np.linalg.inv(c2w[0]) @ c2w, atol=1e-12)
    steps = poses.relative(c2w, "previous")
    np.testing.assert_array_equal(steps[0], np.eye(4))
    np.testing.assert_allclose(steps[1:], np.linalg.inv(c2w[:-1]) @ c2w[1:], atol=1e-12)
    product = np.eye(4)
    for step, pose in zip(steps, first, strict=True):  # the steps multiply up to the path
        product = product @ step
        np.testing.assert_allclose(product, pose, atol=1e-11)


@few
@given(seeds, st.sampled_from(["first", "previous"]), st.sampled_from([None, "max_norm", 0.2]))
def test_relative_does_not_know_the_world_frame(seed, to, normalise):
    c2w = path(seed)
    moved = rigid(seed + 1) @ c2w
    np.testing.assert_allclose(
        poses.relative(moved, to, normalise), poses.relative(c2w, to, normalise), atol=1e-11
    )


@few
@given(seeds, st.floats(1e-3, 1e3))
def test_max_norm_does_not_know_the_scale(seed, scale):
    c2w = path(seed)
    scaled = c2w.copy()
    scaled[:, :3, 3] *= scale
    ours = poses.relative(scaled, "previous", "max_norm")
    np.testing.assert_allclose(ours, poses.relative(c2w, "previous", "max_norm"), atol=1e-11)
    np.testing.assert_allclose(np.linalg.norm(ours[:, :3, 3], axis=-1).max(), 1, atol=1e-12)
    np.testing.assert_allclose(
        poses.relative(c2w, "previous", 0.2)[:, :3, 3], poses.relative(c2w, "previous")[:, :3, 3] / 0.2
    )


def test_a_turning_camera_far_away_is_not_normalised_into_motion():
    c2w = path(3, spread=0.0, centre=165.3)
    for to in ("first", "previous"):
        still = poses.relative(poses.resample(c2w, 5), to, "max_norm")
        np.testing.assert_array_equal(still[:, :3, 3], 0)


def test_relative_leaves_its_input_alone():
    c2w = path(4)
    before = c2w.copy()
    poses.relative(c2w, "first", "max_norm")
    poses.resample(c2w, 3)
    np.testing.assert_array_equal(c2w, before)


@few
@given(seeds, st.sampled_from([(720, 1280), (96, 160), (500, 832)]))
def test_intrinsics_follow_a_pixel_through_resize_and_crop(seed, size):
    rng = np.random.default_rng(seed)
    fx, fy, cx, cy = k = rng.uniform(200, 500, 4)
    crop = (size[0] - 16, size[1] - 32)
    gx, gy, dx, dy = poses.transform_intrinsics(k, size, crop)
    x, y = rng.uniform(-0.5, 0.5, 2)  # a ray direction (x, y, 1) lands on the same image point either way
    u, v = fx * x + cx, fy * y + cy
    np.testing.assert_allclose(gx * x + dx, u * size[1] / 832 - 16, atol=1e-9)
    np.testing.assert_allclose(gy * y + dy, v * size[0] / 480 - 8, atol=1e-9)


def test_half_size_of_the_usual_camera():
    ours = poses.transform_intrinsics(np.array([[416.0, 416.0, 416.0, 240.0]]), (240, 416))
    np.testing.assert_allclose(ours, [[208, 208, 208, 120]])


def broken(frame, change):
    c2w = path(0, 4)
    change(c2w[frame])
    return c2w


def _set(index, value):
    return lambda pose: pose.__setitem__(index, value)


@pytest.mark.parametrize(
    "c2w, said",
    [
        (np.eye(4), "poses has shape (4, 4): must be [frames 4 4]"),
        (np.zeros((0, 4, 4)), "poses has shape (0, 4, 4)"),
        (np.zeros((3, 3, 4)), "poses has shape (3, 3, 4)"),
        (np.full((1, 4, 4), "a"), "poses has type <U1: must be numbers"),
        (broken(2, _set((0, 3), np.nan)), "poses[2] = "),
        (broken(2, _set((1, 3), 1e308)), "poses[2].translation = 1e+308: must be at most 1e+09 world units"),
        (broken(1, _set((3, 0), 0.5)), "poses[1].row3 = 0.5 0 0 1: must be 0 0 0 1"),
        (
            broken(3, _set((slice(3), slice(3)), 2 * np.eye(3))),
            "poses[3].orthogonality_error = 3: must be at most 0.001",
        ),
        (broken(2, _set((slice(3), slice(3)), -np.eye(3))), "poses[2].determinant = -1: must be +1"),
    ],
)
def test_validate_names_frame_and_field(c2w, said):
    with pytest.raises(ConfigError) as error:
        poses.validate(c2w)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda c: poses.relative(c, "last"), "to = 'last'"),
        (lambda c: poses.relative(c, "first", "mean"), "normalise = 'mean'"),
        (lambda c: poses.relative(c, "first", -1.0), "normalise = -1.0"),
        (lambda c: poses.interpolate(c, np.array([9.5])), "must lie in [0, 8]"),
        (lambda c: poses.interpolate(c, np.array([])), "must lie in"),
        (lambda c: poses.resample(c, 0), "t = 0"),
        (lambda c: poses.transform_intrinsics(np.ones(4), (8, 8), (16, 8)), "crop = (16, 8)"),
        (lambda c: poses.validate_intrinsics(np.ones((3, 4)), 9), "must be [4], [1 4] or [9 4]"),
        (lambda c: poses.validate_intrinsics(np.eye(3), 9), "intrinsics has shape (3, 3)"),
        (lambda c: poses.validate_intrinsics([0.0, 1, 1, 1], 9), "intrinsics[0] = "),
        (
            lambda c: poses.validate_intrinsics([1e38, 1, 1, 1], 9),
            "must be positive, in [0.001, 1e+06] pixels",
        ),
        (lambda c: poses.validate_intrinsics([1, 1, 1e38, 1], 9), "cx and cy must lie within 1e+06 pixels"),
        (
            lambda c: poses.validate_intrinsics(np.array(["1", "a", "b", "c"]), 9),
            "has type <U1: must be numbers",
        ),
        (lambda c: poses.validate_intrinsics([np.inf, 1, 1, 1], 9), "must be finite"),
    ],
)
def test_refusals(call, said):
    with pytest.raises(ConfigError) as error:
        call(path(0))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_load_reads_a_published_folder(tmp_path):
    c2w = path(5, 13).astype(np.float32)
    np.save(tmp_path / "poses.npy", c2w)
    with pytest.raises(ConfigError, match="intrinsics.npy: missing"):
        poses.load(tmp_path)
    np.save(tmp_path / "intrinsics.npy", np.array([416.0, 416, 416, 240]))
    ours, intrinsics = poses.load(tmp_path)
    np.testing.assert_array_equal(ours, c2w)
    assert ours.dtype == np.float64 and intrinsics.shape == (13, 4)
    np.save(tmp_path / "intrinsics.npy", np.ones((12, 4)))
    np.testing.assert_array_equal(poses.load(tmp_path)[1], np.ones((13, 4)))
    np.save(tmp_path / "intrinsics.npy", 1 + np.arange(48.0).reshape(12, 4))
    with pytest.raises(ConfigError, match=r"must be \[4\], \[1 4\] or \[13 4\]"):
        poses.load(tmp_path)
    np.save(tmp_path / "intrinsics.npy", np.ones(4))


def _npy(shape: str, descr: str = "<f8", data: bytes = b"", version=(1, 0)) -> bytes:
    """A file with any header, however false."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    length = len(header).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + length + header + data


def _zip() -> bytes:
    file = io.BytesIO()
    np.savez(file, np.eye(4))
    return file.getvalue()


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "not a plain .npy array"),
        (b"1 0 0 0\n0 1 0 0\n", "not a plain .npy array"),
        (_zip(), "not a plain .npy array"),
        (pickle.dumps(np.eye(4)), "not a plain .npy array"),
        (_npy("(1,)", "|O", pickle.dumps([1])), "it holds object"),
        (_npy("(1000000000, 4, 4)"), "takes 128000000000 bytes, the file has 0"),
        (_npy("(4611686018427387904, 4, 4)"), "the file has 0"),
        (_npy("(-1, -2)", data=bytes(16)), "shape (-1, -2)"),
        (_npy("((" * 1000 + "))" * 1000), "not a plain .npy array"),
        (_npy("(1," * 3000 + ")"), "not a plain .npy array"),
        (_npy("(2,)", data=bytes(16), version=(9, 0)), "not a plain .npy array"),
        (_npy("(4, 4)", "<c16", bytes(256)), "it holds complex128"),
    ],
)
def test_files_that_are_not_arrays_are_refused_in_one_line(tmp_path, content, said):
    (tmp_path / "poses.npy").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        poses.load(tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500
