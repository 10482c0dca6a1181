"""XLA flags of every process that the tests start."""

# Programs run once or a few times on toy sizes: the time goes into compiling them.
UNOPTIMIZED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def flags(devices: int = 1) -> str:
    """Of a process with that many virtual CPU devices."""
    return f"{UNOPTIMIZED} --xla_force_host_platform_device_count={devices}"
