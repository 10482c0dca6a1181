"""One owner per folder, on one host and across hosts, on disks and in object stores (which have no locks).

The owner writes `owner.json` {token, host, pid, started, beat} and renews `beat` while it lives. Whoever finds such a
file decides without trusting clocks: on the same host the process is looked up (a dead one is replaced at once), of
another host it is watched whether the file changes; one that is silent for `SILENCE` seconds is replaced.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from typing import Any

import psutil
from etils import epath

from lingbot_jax.config import ConfigError
from lingbot_jax.files import is_remote, write_whole
from lingbot_jax.worlds import storage

_log = logging.getLogger(__name__)

OWNER = "owner.json"
BEAT = 10.0  # seconds between signs of life
SILENCE = 60.0  # seconds after which the owner on another host counts as dead
LONG_DEAD = 86400.0  # seconds by the clock: no two clocks differ by as much
SETTLE = 0.5  # seconds after which the last of several that wrote at the same time is known


class Owner:
    """A context manager that holds a folder.

    Raises:
      ConfigError: another process has it. What a file system raises, where the folder cannot be written.
    """

    def __init__(self, folder: epath.Path):
        self._folder, self._path = folder, folder / OWNER
        process = psutil.Process()
        self._record = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": process.pid,
            "started": process.create_time(),
        }
        self._over = threading.Event()
        self._rival: dict[str, Any] | None = None

    def __enter__(self) -> "Owner":
        self._wait_for_another()
        if not self._create():
            self._write()
            time.sleep(SETTLE)
        found = _read(self._path)
        if found is None or found["token"] != self._record["token"]:
            raise self._refusal(found)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()
        found = _read(self._path)
        if found is not None and found["token"] == self._record["token"]:
            with contextlib.suppress(OSError):  # it was a sign of life; without us nobody looks for more
                self._path.unlink()

    def check(self) -> None:
        """Raises ConfigError if another process has taken the folder over: this one looked dead for a while."""
        if self._rival is not None:
            raise self._refusal(self._rival)

    def _wait_for_another(self) -> None:
        """Returns when whoever owns the folder is dead. Raises ConfigError if it lives."""
        found = _read(self._path)
        if found is None or time.time() - found["beat"] > LONG_DEAD:
            return
        if found["host"] == self._record["host"]:
            if _lives(found):
                raise self._refusal(found)
            return
        _log.warning("%s belongs to a process on %s: waiting to see if it lives", self._folder, found["host"])
        until = time.monotonic() + SILENCE
        while time.monotonic() < until:
            time.sleep(min(1.0, SILENCE / 4))
            again = _read(self._path)
            if again is None:
                return
            if again["beat"] != found["beat"] or again["token"] != found["token"]:
                raise self._refusal(again)

    def _create(self) -> bool:
        """Of several processes that find no file one succeeds; False where there is one, or no such operation."""
        if is_remote(self._path) or self._path.exists():
            return False
        draft = self._folder / f".{OWNER}.{self._record['token']}"
        try:
            draft.write_text(self._text())
            os.link(draft, self._path)
        except FileExistsError:
            raise self._refusal(_read(self._path)) from None
        except OSError:
            return False
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _write(self) -> None:
        write_whole(self._path, self._text())

    def _text(self) -> str:
        return json.dumps(self._record | {"beat": time.time()})

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            try:
                found = _read(self._path)
                if found is not None and found["token"] != self._record["token"]:
                    self._rival = found
                    return
                self._write()
            except Exception as error:  # a full disk, a store that is away for a while: the next one may do
                _log.warning("%s cannot be renewed: %s", self._path, error)

    def _refusal(self, found: dict[str, Any] | None) -> ConfigError:
        who = f"process {found['pid']} on {found['host']}" if found else "another process"
        return ConfigError(
            f"run = {os.fspath(self._folder)!r}: {who} is training it; choose another run directory, or stop that one"
        )


def _read(path: epath.Path) -> dict[str, Any] | None:
    """The owner's record; None if there is none, or one that is cut off: nobody lives who wrote it."""
    if not storage.is_file(path):
        return None
    try:
        found = json.loads(path.read_text())
        kinds = {"token": str, "host": str, "pid": int, "started": float, "beat": float}
        return found if all(isinstance(found[name], kind) for name, kind in kinds.items()) else None
    except (ValueError, KeyError, TypeError, OSError):
        return None


def _lives(found: dict[str, Any]) -> bool:
    """Whether the process of a record of this host is there: the same one, and not only its number."""
    try:
        process = psutil.Process(found["pid"])
        zombie = process.status() == psutil.STATUS_ZOMBIE
        return not zombie and abs(process.create_time() - found["started"]) < 2
    except psutil.NoSuchProcess:
        return False
