"""Golden cases of cameras: resampling, relative poses, intrinsics, rays and the camera embedding."""

import numpy as np

from lingbot_jax.control import plucker, poses
from tests.golden import EXACT, Tolerance

STRIDE = 8  # pixels a latent pixel in the published pipeline

SYNTH = Tolerance(atol=1e-5)
ROTATION = Tolerance(atol=1e-5)
# pipeline_dims: poses used, latent frames, latent height and width, height and width in pixels, tokens.
FRAMES, LATENTS, LATENT_H, LATENT_W, HEIGHT, WIDTH, TOKENS = range(7)


def _packed(golden):
    """[1 C t h w] as published, to our [t h w C]."""
    return golden[0].transpose(1, 2, 3, 0)


def _base(case):
    return case.config["height_org"], case.config["width_org"]


def cam_synth(case):
    for p in (q for q in case.prefixes() if q.startswith("traj")):
        c2w, intrinsics = poses.validate(case[f"{p}/c2ws"]), case[f"{p}/Ks"]
        at = np.linspace(0, len(c2w) - 1, len(case[f"{p}/tgt_indices"]))
        yield f"{p}/tgt_indices", at, case[f"{p}/tgt_indices"], SYNTH
        latent = poses.resample(c2w, len(at))
        yield f"{p}/interp", latent, case[f"{p}/interp"], SYNTH
        for framewise, to in enumerate(("first", "previous")):
            for norm, normalise in enumerate((None, "max_norm")):
                name = f"{p}/rel_framewise{framewise}_norm{norm}"
                yield name, poses.relative(latent, to, normalise), case[name], SYNTH

        dims = case[f"{p}/pipeline_dims"]
        size = (int(dims[HEIGHT]), int(dims[WIDTH]))
        intrinsics = poses.transform_intrinsics(intrinsics, size, base=_base(case))
        yield f"{p}/Ks_pipeline", intrinsics, case[f"{p}/Ks_pipeline"], SYNTH
        c2w = c2w[: dims[FRAMES]]
        latent = poses.resample(c2w, int(dims[LATENTS]))
        yield f"{p}/pipeline_interp", latent, case[f"{p}/pipeline_interp"], SYNTH
        deltas = poses.relative(latent, "previous", "max_norm")
        yield f"{p}/pipeline_rel", deltas, case[f"{p}/pipeline_rel"], SYNTH
        yield f"{p}/plucker", plucker.rays(deltas, intrinsics[:1], *size), case[f"{p}/plucker"], SYNTH
        packed = plucker.control(deltas, intrinsics[:1], None, "cam", *size, STRIDE)
        yield f"{p}/packed", packed, _packed(case[f"{p}/packed"]), SYNTH
        yield f"{p}/pipeline_dims", [len(c2w), *packed.shape[:3]], dims[: LATENT_W + 1], EXACT
        # The mask marks the given pixel frames, here the first alone, in all channels of its latent frame.
        mask = np.zeros(case[f"{p}/pipeline_mask"].shape)
        mask[:, 0] = 1
        yield f"{p}/pipeline_mask", mask, case[f"{p}/pipeline_mask"], EXACT

    per_frame = case["perframe/plucker"]
    rays = plucker.rays(case["traj0/rel_framewise0_norm1"], case["perframe/Ks"], *per_frame.shape[1:3])
    yield "perframe/plucker", rays, per_frame, SYNTH
    still = np.tile(case["traj0/c2ws"][:1].astype(np.float64), (len(case["static/rel"]), 1, 1))
    yield "static/rel", poses.relative(still, "previous", "max_norm"), case["static/rel"], SYNTH
    targets, transformed = case["Ks_targets"], case["Ks_transformed"]
    for i, (h, w, crop_h, crop_w) in enumerate(targets.tolist()):
        ours = poses.transform_intrinsics(case["traj0/Ks"], (h, w), (crop_h, crop_w), _base(case))
        # Values up to ~1e3 in float32: one unit in the last place is 6e-5.
        yield f"Ks_transformed/{i}", ours, transformed[i], Tolerance(atol=1e-5, rtol=1e-7)


def cam_examples(case):
    for p in case.prefixes():
        c2w = poses.validate(case[f"{p}/c2ws"])
        at = np.linspace(0, len(c2w) - 1, len(case[f"{p}/tgt_indices"]))
        yield f"{p}/tgt_indices", at, case[f"{p}/tgt_indices"], SYNTH
        # Positions near 165: float32 itself is off by 8e-6 there.
        latent = poses.resample(c2w, len(at))
        yield f"{p}/interp", latent, case[f"{p}/interp"], Tolerance(atol=1e-5, rtol=1e-7)
        gap = dict(zip(("previous", "first", "packed"), case[f"{p}/f32_gap"].tolist(), strict=True))

        def both(name, ours, golden, width):
            yield f"{name}/rotation", ours[:, :3, :3], golden[:, :3, :3], ROTATION
            yield f"{name}/translation", ours[:, :, 3], golden[:, :, 3], Tolerance(atol=2 * width + 1e-5)

        # The published functions were fed float32 poses after resampling, in float32 and in float64.
        for framewise, to in enumerate(("first", "previous")):
            for digits in ("", "64"):
                name = f"{p}/rel{digits}_framewise{framewise}"
                ours = poses.relative(_rounded(latent), to, "max_norm")
                yield from both(name, ours, case[name], 0.0 if digits else gap[to])

        dims = case[f"{p}/dims"]
        size = (int(dims[HEIGHT]), int(dims[WIDTH]))
        intrinsics = poses.transform_intrinsics(case[f"{p}/Ks"], size, base=_base(case))
        latent = poses.resample(c2w[: dims[FRAMES]], int(dims[LATENTS]))
        deltas = poses.relative(_rounded(latent), "previous", "max_norm")
        packed = plucker.control(deltas, intrinsics[:1], None, "cam", *size, STRIDE)
        yield f"{p}/dims", [dims[FRAMES], *packed.shape[:3]], dims[: LATENT_W + 1], EXACT
        for digits in ("", "64"):
            width = 0.0 if digits else gap["packed"]
            yield from both(f"{p}/pipeline_rel{digits}", deltas, case[f"{p}/pipeline_rel{digits}"], width)
            golden = _packed(case[f"{p}/packed{digits}"])
            yield f"{p}/packed{digits}", packed, golden, Tolerance(atol=2 * width + 1e-5)


def _rounded(c2w):
    return c2w.astype(np.float32).astype(np.float64)


CASES = {"cam_synth": cam_synth, "cam_examples": cam_examples}
