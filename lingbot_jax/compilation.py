"""Compiled programs are kept between processes: a resumed run and a second sample need not compile again."""

import os

import jax

from lingbot_jax.config import ConfigError
from lingbot_jax.files import is_remote

OFF = "off"


def default_folder() -> str:
    """The user's cache folder, as XDG has it."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(home, "lingbot_jax", "xla")


def keep_compiled(folder: str | None = None) -> None:
    """Turns JAX's persistent compilation cache on, in `folder` (None: the user's; `off`: none).

    JAX_COMPILATION_CACHE_DIR in the environment goes before all of them.

    Raises:
      ConfigError: a folder that was asked for cannot be written. Without the user's own, nothing is kept.
    """
    if folder == OFF or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    chosen = os.path.expanduser(folder or default_folder())
    if not is_remote(chosen):
        chosen = os.path.abspath(chosen)
        try:
            os.makedirs(chosen, exist_ok=True)
            writable, why = os.access(chosen, os.W_OK), "no permission"
        except OSError as error:
            writable, why = False, error.strerror
        if not writable:
            if folder is None:
                return
            raise ConfigError(
                f"compilation_cache = {folder!r}: cannot be written ({why}); choose another, or off"
            )
    jax.config.update("jax_compilation_cache_dir", chosen)
