"""How the worlds of LingBot-World 2.0 are sampled. Their checkpoint folders do not say it; docs/lingbot2.md does."""

from typing import Any

from lingbot_jax.diffusion.guidance import Guidance
from lingbot_jax.worlds.config import CausalConfig, SampleConfig

_LEVELS = (0, 250, 500, 750)


def _fast(**changes: Any) -> dict[str, Any]:
    """Four steps in chunks of four latent frames, window 18 with sink 6."""
    causal = {"chunk": 4, "window": 18, "sink": 6, "levels": _LEVELS}
    return {"sample": None, "causal": CausalConfig(**causal | changes)}


# The published command line uses the first two. The next two are what other servers run the 14B model with: which of
# them it was distilled for is not settled.
PRESETS: dict[str, dict[str, Any]] = {
    "lingbot2-14b": _fast(shift=10.0),
    "lingbot2-1.3b": _fast(shift=5.0),
    "lingbot2-14b-warped": _fast(shift=5.0, schedule="warped", levels=(1000, 750, 500, 250)),
    "lingbot2-14b-first-levels": _fast(shift=10.0, levels=(0, 179, 358, 679)),
    "lingbot2-14b-causal-pretrain": {
        "sample": None,
        "causal": CausalConfig(
            chunk=4,
            window=None,
            sink=0,
            positions="absolute",
            sample=SampleConfig(steps=40, shift=10.0, solver="unipc", guidance=Guidance(low=5.0, high=5.0)),
        ),
    },
    "lingbot2-14b-bidirectional": {"sample": SampleConfig(steps=70, shift=10.0), "causal": None},
}
SMALL = 1536  # width of the 1.3B
# Folders that have one transformer of the 14B, and which.
SECOND = {"transformers": "lingbot2-14b", "transformer_causal": "lingbot2-14b-causal-pretrain"}
SECOND_CLASSES = {"transformers": "WanXModel", "transformer_causal": "WanModelCausal"}
