"""The configs of the post-training stages `causal` and `distill` (paper section 3.4)."""

from typing import Literal

from pydantic import Field

from lingbot_jax.config import Below1, config


@config
class ForcingConfig:
    """Stage `causal`: what past a noisy chunk has while it learns, and how its error counts."""

    method: Literal["diffusion_forcing", "teacher_forcing"] = Field(
        "diffusion_forcing",
        description="the past of a chunk is at noise levels of its own (paper), or a clean copy of the clip",
    )
    weighting: Literal["x0", "velocity"] = Field(
        "x0",
        description="error of the clean latent (paper Eq. 2: sigma^2 times that of the velocity), or of the velocity",
    )
    clean: Below1 = Field(
        0.25, description="share of chunks at t = 0, which teach as context alone (diffusion_forcing)"
    )
