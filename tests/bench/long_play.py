"""Ten minutes of play (9,600 frames at 16 a second) at tiny size: memory, step time and compilations.

python -m tests.bench.long_play [--frames=9600]

`make bench` runs a quarter of it.
"""

import argparse
import gc
import time

import jax
import jax.monitoring
import numpy as np
import psutil

from lingbot_jax.control import keyboard
from lingbot_jax.rollout.session import Session
from lingbot_jax.worlds.config import CausalConfig
from tests.rollout.worlds import world

WARM_UP = 60  # steps before the first measurement: the window is full and allocators have settled


def play(frames: int) -> str:
    """Plays with random keys and prompt events; returns a line of numbers.

    Raises:
      AssertionError: something was compiled after the warm-up, or device arrays grew.
    """
    session = Session(world(), causal=CausalConfig(chunk=3, window=15, sink=3), conditioning_frames=3)
    rng = np.random.default_rng(0)
    session.start(rng.integers(0, 256, (48, 64, 3), np.uint8), "a hall", seed=1)
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    shown, seconds, process, began = 0, [], psutil.Process(), time.perf_counter()
    while shown < frames:
        if len(seconds) == WARM_UP:
            gc.collect()
            arrays, resident = sum(x.nbytes for x in jax.live_arrays()), process.memory_info().rss
            compiled.clear()
        if len(seconds) % 50 == 10:
            session.set_prompt(
                f"a hall with light {len(seconds)}", chunks=2, rebuild_cache=len(seconds) % 100 == 10
            )
        keys = rng.random(len(keyboard.KEYS)) < 0.3
        start = time.process_time()  # of all threads: what others do on this machine is not in it
        shown += len(session.step(keys))
        seconds.append(time.process_time() - start)
    gc.collect()
    grown = process.memory_info().rss / resident - 1
    assert not compiled, f"compiled after the warm-up: {compiled}"
    assert sum(x.nbytes for x in jax.live_arrays()) <= arrays
    steady = np.array(seconds[WARM_UP:])
    tenth = max(len(steady) // 10, 1)
    ratio = np.median(steady[-tenth:]) / np.median(steady[:tenth])
    return (
        f"{shown} frames ({shown / 16 / 60:.1f} minutes at 16/s) in {time.perf_counter() - began:.1f} s: "
        f"resident memory {100 * grown:+.2f}% after warm-up, 0 compilations, "
        f"CPU time a chunk {np.median(steady) * 1000:.1f} ms, last tenth / first tenth {ratio:.2f}"
    )


def run() -> list[str]:
    return [play(2400)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=9600)
    print(play(parser.parse_args().frames))
