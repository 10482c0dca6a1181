"""Checks the shape and dtype annotations of networks, control, diffusion, sharding and rollouts in the tests.

A wrong shape then fails at the call, with the names of its axes. Must run before the modules are imported, hence a
conftest.
"""

from jaxtyping import install_import_hook

CHECKED = ("models", "control", "diffusion", "parallel", "rollout")

install_import_hook([f"lingbot_jax.{name}" for name in CHECKED], "beartype.beartype")

from tests.object_store import broken_bucket, bucket, emulated_bucket  # noqa: E402, F401
