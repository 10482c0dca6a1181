"""A second file system behind etils.epath: gs:// in this process's memory, which cannot rename, as object stores cannot."""

import importlib

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
