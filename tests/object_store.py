"""Object stores for tests: gs:// in this process's memory, which cannot rename (nor can real ones), and an emulator."""

import importlib
import socket

import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem


class ObjectStore(MemoryFileSystem):
    protocol = ("gs", "gcs")
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        bucket = "/" + str(path).removeprefix("gcs://").removeprefix("gs://").strip("/")
        if bucket.startswith("/broken"):
            raise ConnectionAbortedError("no such bucket: broken")
        return "" if bucket == "/" else bucket

    def mv(self, *args, **kwargs):
        raise AssertionError("an object store cannot rename")

    rename = move = mv


@pytest.fixture
def bucket(monkeypatch):
    """`gs://bucket`, empty."""
    monkeypatch.setenv("EPATH_USE_TF", "false")
    monkeypatch.setattr(ObjectStore, "store", {})
    monkeypatch.setattr(ObjectStore, "pseudo_dirs", [""])
    registry = importlib.import_module("fsspec.registry")._registry  # fsspec.registry is a view of it
    for protocol in ObjectStore.protocol:
        monkeypatch.setitem(registry, protocol, ObjectStore)
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    ObjectStore.clear_instance_cache()
    yield "gs://bucket"
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()


@pytest.fixture
def broken_bucket(bucket):
    """A bucket that is not there."""
    return "gs://broken"


@pytest.fixture
def emulated_bucket(monkeypatch):
    """`gs://bucket` of a storage emulator, reached by gcsfs and ArrayRecord's own client as the real one."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    monkeypatch.setenv("EPATH_USE_TF", "false")
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="pip install -e .[test]")
    pytest.importorskip("gcsfs", reason="pip install -e .[test]")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name in ("STORAGE_EMULATOR_HOST", "CLOUD_STORAGE_EMULATOR_ENDPOINT"):
        monkeypatch.setenv(name, f"http://localhost:{port}")
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    with emulator.create_server("localhost", port, in_memory=True, default_bucket="bucket"):
        yield "gs://bucket"
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
