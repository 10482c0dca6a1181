"""Crops brought to another size keep the ray of every pixel."""

import numpy as np

from lingbot_jax.data.crops import resize_crops


def test_resized_crops_keep_the_ray_of_every_pixel():
    rng = np.random.default_rng(0)
    ramp = np.broadcast_to(np.arange(40, dtype=np.float32)[None, :, None] * 4 + 20, (20, 40, 3))
    frames = np.broadcast_to(ramp, (2, 3, 20, 40, 3)).astype(np.uint8)
    intrinsics = np.tile(np.float32([30, 28, 20, 10]), (2, 3, 1))
    crops = {"frames": frames, "intrinsics": intrinsics, "keys": rng.integers(0, 2, (2, 3, 8))}
    made = resize_crops(crops, (32, 32))
    assert made["frames"].shape == (2, 3, 32, 32, 3) and made["frames"].dtype == np.uint8
    assert made["keys"] is crops["keys"]
    # Scaled by 1.6 to 32 x 64, sixteen columns cut off on either side. The grey value tells the ray's direction:
    # a pixel centre at x in the new picture looks along (x - cx) / fx, and so did the one of that grey in the old.
    fx, fy, cx, cy = made["intrinsics"][0, 0]
    np.testing.assert_allclose([fx, fy, cx, cy], [48, 44.8, 16, 16])
    grey = made["frames"][0, 0, 16, :, 0].astype(np.float64)
    old_x = (grey - 20) / 4 + 0.5
    np.testing.assert_allclose((np.arange(32) + 0.5 - cx) / fx, (old_x - 20) / 30, atol=0.02)
    assert resize_crops(crops, (0, 0)) is crops and resize_crops(crops, (20, 40)) is crops
