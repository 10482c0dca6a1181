"""What holds for all tests. Must run before the modules are imported.

The shape and dtype annotations of networks, control, diffusion, sharding and rollouts are checked: a wrong shape fails
at the call, with the names of its axes. Programs run once or a few times on toy sizes here, so XLA is told not to
optimise them: the time goes into compiling. Modules marked `long` start first, so that no core waits for them at the
end.
"""

import os

from jaxtyping import install_import_hook

from tests import xla

os.environ.setdefault("XLA_FLAGS", xla.flags())

CHECKED = ("models", "control", "diffusion", "parallel", "rollout")

install_import_hook([f"lingbot_jax.{name}" for name in CHECKED], "beartype.beartype")

from tests.object_store import broken_bucket, bucket, emulated_bucket  # noqa: E402, F401


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
