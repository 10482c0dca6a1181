"""How the tests compile: hardly optimised, as programs run a few times on toy sizes, and into one cache."""

import os
from importlib import metadata

CACHE = "JAX_COMPILATION_CACHE_DIR"
# The older of XLA's two emitters, gone with JAX 0.12, compiles a third faster. The scheduler that goes with the
# newer one lets collectives of several devices wait for each other for ever here.
_OLD = tuple(map(int, metadata.version("jax").split(".")[:2])) < (0, 11)
UNOPTIMIZED = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_enable_concurrency_optimized_scheduler=false"
) + (" --xla_cpu_use_fusion_emitters=false" if _OLD else "")


def flags(devices: int = 1) -> str:
    """XLA_FLAGS of a process with that many virtual CPU devices."""
    return f"{UNOPTIMIZED} --xla_force_host_platform_device_count={devices}"


def environment(cache: str | os.PathLike, devices: int = 1) -> dict[str, str]:
    """What is added to the environment of a process; `cache`: where compiled programs are kept."""
    return {
        "XLA_FLAGS": flags(devices),
        "JAX_PLATFORMS": "cpu",
        CACHE: os.fspath(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
