"""Ends a process that waits for ever: otherwise a dead disk or a stuck collective looks like a slow step.

The waits of the loop (XLA, the loader, files) let other threads run, so a thread can watch them.
"""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
from collections.abc import Iterator

import jax

from lingbot_jax.parallel import multihost


@contextlib.contextmanager
def bounded(what: str, seconds: float | None) -> Iterator[None]:
    """Around a wait for `what`. After `seconds` (None: never) the process dumps its stacks and exits with code 124; its
    peers then end as for any lost process."""
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, end, (what, seconds))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def end(what: str, seconds: float) -> None:
    """Says on stderr who waited for what and where every thread is, and ends the process at once."""
    who = f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"
    print(f"error: {who}: waited {seconds:g} s for {what}; its threads:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.stderr)
    print("the same command resumes from the newest checkpoint", file=sys.stderr, flush=True)
    os._exit(multihost.STALLED)
