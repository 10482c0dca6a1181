"""Interactive world models in JAX.

    import lingbot_jax

    world = lingbot_jax.open_world("runs/demo/action")     # a run or a bundle, local or gs://
    session = world.session()                              # with the world's own settings
    session.start(image, "a hall")
    frames = session.step(keys)                            # uint8 video frames of the next chunk

Importing the package, or one of its configs, imports no JAX: that happens at the first use of a name below.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lingbot_jax.worlds.open import open_world
    from lingbot_jax.worlds.world import World

_HOMES = {"open_world": "lingbot_jax.worlds.open", "World": "lingbot_jax.worlds.world"}
__all__ = ["World", "open_world"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
