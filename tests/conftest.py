"""Checks the shape and dtype annotations of the world model while the tests call it.

A wrong shape then fails at the call, with the names of its axes. Must run before the modules are imported, hence a
conftest. Modules are listed one by one, because beartype refuses protocols that are not runtime-checkable.
"""

from jaxtyping import install_import_hook

NETWORK = ("attention", "control", "dit", "experts", "layers", "rope")
CHECKED = [f"lingbot_jax.models.{name}" for name in NETWORK] + ["lingbot_jax.control"]

install_import_hook(CHECKED, "beartype.beartype")

from tests.object_store import broken_bucket, bucket  # noqa: E402, F401
