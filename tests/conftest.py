"""Checks the shape and dtype annotations of the models while the tests call them.

Must run before the modules are imported, hence a conftest. A wrong shape then fails at the call with the axis names.
"""

from jaxtyping import install_import_hook

install_import_hook(["lingbot_jax.models"], "beartype.beartype")
