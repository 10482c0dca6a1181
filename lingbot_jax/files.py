"""Files and folders that appear whole or not at all, on a local disk or in an object store (gs://).

A local one is written under a hidden name beside its own and renamed when it is whole. What a killed process left
under such a name is removed by the next one that writes into the same folder. An object store shows a file only
when its upload has ended, and cannot rename: files are made locally and copied there, folders are written in place
(so whatever marks a folder as whole must be its last file).
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath

from lingbot_jax.config import ConfigError, require

JSON_BYTES = 64 << 20  # far above any config or index
_HOST = re.sub(r"\W", "_", socket.gethostname())
_PARTIAL = re.compile(r"\..*\.(?P<host>\w+)-(?P<pid>\d{1,9})\.partial")


def is_remote(path: epath.PathLike) -> bool:
    """Whether the path is in an object store."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def reached(path: epath.PathLike, field: str) -> Iterator[None]:
    """Turns what a file system says about `path` into a ConfigError of one line that names `field`."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        # The libraries of object stores (credentials, buckets, transport) have no common class of exceptions.
        if not is_remote(path) and not isinstance(error, OSError):
            raise
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ConfigError(f"{field} = {os.fspath(path)!r}: {' '.join(said.split())[:300]}") from error


@contextlib.contextmanager
def whole_file(path: epath.PathLike) -> Iterator[pathlib.Path]:
    """A local file to write that becomes `path` (replacing what was there) if the block ends well, or is removed.

    Its folder must exist; one that cannot be written to is found before the block runs.

    Raises:
      OSError: of the folder. Of an object store: what its library raises.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            partial = pathlib.Path(folder) / epath.Path(path).name
            yield partial
            epath.Path(partial).copy(path, overwrite=True)
        return
    path = pathlib.Path(path).absolute()
    partial = _begin(path)
    partial.touch()
    try:
        yield partial
        _to_disk(partial)
        partial.replace(path)
        _to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a file that appears whole or not at all; texts as UTF-8. Raises as `whole_file`."""
    with whole_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_folder(out: epath.PathLike, nbytes: int = 0, field: str = "out") -> Iterator[epath.Path]:
    """An empty folder to fill that becomes `out` if the block ends well, and is removed if it does not.

    Args:
      nbytes: that will be written; refused before the block runs if the disk has less free.
      field: the flag that `out` came from, for errors.

    Raises:
      ConfigError: `out` exists, or its folder is missing, cannot be written to or is too full.
    """
    with reached(out, field):
        path = epath.Path(out) if is_remote(out) else epath.Path(pathlib.Path(out).absolute())
        require(not path.exists(), field, os.fspath(out), "exists; choose another folder or remove it")
        if not is_remote(out):
            require(path.parent.is_dir(), field, os.fspath(out), "its parent folder does not exist")
            free = shutil.disk_usage(path.parent).free
            room = f"needs {nbytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there"
            require(nbytes < free, field, os.fspath(out), room)
        partial = path if is_remote(out) else epath.Path(_begin(pathlib.Path(path)))
        partial.mkdir(parents=True)
    try:
        yield partial
        if not is_remote(out):
            for folder, _, names in os.walk(partial, topdown=False):
                for name in (*names, "."):
                    _to_disk(pathlib.Path(folder) / name)
            with reached(out, field):
                os.rename(partial, path)
            _to_disk(pathlib.Path(path.parent))
    except BaseException:
        partial.rmtree(missing_ok=True)
        raise


def copy_files(source: epath.Path, target: epath.Path) -> None:
    """Copies all files below a folder into an existing one, from any file system to any."""
    for entry in source.iterdir():
        if entry.is_dir():
            (target / entry.name).mkdir(exist_ok=True)
            copy_files(entry, target / entry.name)
        else:
            (target / entry.name).write_bytes(entry.read_bytes())


def read_json(path: epath.PathLike, field: str = "") -> dict[str, Any]:
    """A JSON object from a regular file of a size that can be meant.

    Args:
      field: the flag that the path came from, for errors.

    Raises:
      ConfigError: there is none, or it is damaged, too large or nested too deeply.
    """
    path, where = epath.Path(path), f"{field} = {os.fspath(path)!r}" if field else os.fspath(path)
    if not (path.exists() if is_remote(path) else pathlib.Path(path).is_file()):  # a FIFO would hang
        raise ConfigError(f"{where}: no such file")
    try:
        if path.stat().length > JSON_BYTES:
            raise ConfigError(f"{where}: is larger than {JSON_BYTES >> 20} MiB")
        value = json.loads(path.read_text())
    except RecursionError:
        raise ConfigError(f"{where}: is nested too deeply") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{where}: not JSON ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: not a JSON object")
    return value


def sweep(folder: pathlib.Path) -> None:
    """Removes what processes of this host that are gone left half written in `folder`."""
    for entry in os.scandir(folder):
        found = _PARTIAL.fullmatch(entry.name)
        if found and found["host"] == _HOST and not _alive(int(found["pid"])):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                pathlib.Path(entry.path).unlink(missing_ok=True)


def _begin(path: pathlib.Path) -> pathlib.Path:
    """The name to write `path` under, free: of this process, so what stands there was left by its like."""
    sweep(path.parent)
    partial = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.partial")
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    return partial


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


def _to_disk(path: pathlib.Path) -> None:
    """Waits until a file or the list of a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
