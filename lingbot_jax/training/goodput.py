"""Where the wall time of a start goes: into steps (goodput), and by cause of the rest; and memory of the devices."""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax

# What is not a step: opening and reading what the run starts from; entering a phase and the first run of a program;
# waiting for clips while no device works; what of saving is waited for; the evaluation value.
LOST = ("restore", "compile", "data", "checkpoint", "evaluation")
STEP = "step"


class Goodput:
    """Seconds by cause since it was made. A cause is not measured inside another.

    Args:
      clock: seconds, of which differences count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._began = clock, clock()
        self._seconds = dict.fromkeys((STEP, *LOST), 0.0)

    def restored(self) -> None:
        """All until now went into the start."""
        self._seconds["restore"] = self._clock() - self._began

    @contextlib.contextmanager
    def on(self, cause: str, busy_until: Callable[[], float] | None = None) -> Iterator[None]:
        """Counts the block as `cause`.

        Args:
          busy_until: when the devices had nothing more to do, inf if they still have: until then they were in a step,
            and nothing was lost.
        """
        began = self._clock()
        yield
        ended = self._clock()
        idle = began if busy_until is None else min(max(began, busy_until()), ended)
        self._seconds[STEP] += idle - began
        self._seconds[cause] += ended - idle

    def shares(self) -> dict[str, float]:
        """`goodput`, `lost_compile`, ... and `lost_other` of the wall time until now; their sum is 1."""
        whole = max(self._clock() - self._began, 1e-9)
        found = {"goodput": self._seconds[STEP] / whole}
        found |= {f"lost_{cause}": self._seconds[cause] / whole for cause in LOST}
        return found | {"lost_other": 1 - sum(found.values())}

    def line(self) -> str:
        """The shares in one line, the largest loss first."""
        goodput, *rest = self.shares().items()
        lost = [f"{name[5:]} {100 * share:.1f} %" for name, share in sorted(rest, key=lambda x: -x[1])]
        seconds = self._clock() - self._began
        text = f"goodput {100 * goodput[1]:.1f} % of {seconds:.0f} s; lost to {', '.join(lost)}"
        memory = device_memory()
        return f"{text}; device memory at most {memory['memory_peak_gb']:.1f} GB" if memory else text


def device_memory() -> dict[str, float]:
    """GB in use, and at most so far, of the fullest device of this process; empty where the backend does not say."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    keys = {"memory_gb": "bytes_in_use", "memory_peak_gb": "peak_bytes_in_use"}
    return {name: max(found[key] for found in stats) / 1e9 for name, key in keys.items()} if stats else {}
