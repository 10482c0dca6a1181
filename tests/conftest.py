"""What holds for all tests. Must run before the modules are imported.

The shape and dtype annotations of networks, control, diffusion, sharding and rollouts are checked: a wrong shape fails
at the call, with the names of its axes. Compiled programs are shared by everything that the suite starts (`xla`).
Modules marked `long` start first, so that no core waits for them at the end.
"""

import gc
import os
import tempfile

from tests import xla

# The first process makes it, for all that it starts, and removes it when it ends.
if xla.CACHE not in os.environ:
    made = tempfile.TemporaryDirectory(prefix="lingbot_jax-compiled-")
    os.environ[xla.CACHE] = made.name
os.environ |= xla.environment(os.environ[xla.CACHE]) | os.environ

gc.set_threshold(100_000, 50, 100)  # by default, a tenth of the suite's time looks through what tracing made

from jaxtyping import install_import_hook  # noqa: E402 - JAX reads its environment when it is imported

CHECKED = ("models", "control", "diffusion", "parallel", "rollout")

install_import_hook([f"lingbot_jax.{name}" for name in CHECKED], "beartype.beartype")

from tests.object_store import broken_bucket, bucket, emulated_bucket  # noqa: E402, F401


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
