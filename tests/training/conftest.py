"""One data set, one cache of compiled programs and one uninterrupted run for all tests of this folder."""

import jax
import pytest

from tests.training import micro


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    with pytest.MonkeyPatch.context() as patch:
        before = micro.share_compilations(folder / "compiled", patch.setenv)
        micro.make_data(folder)
        yield folder
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture(scope="package")
def whole(folder):
    """The config of a run of two experts over two phases that nothing interrupted."""
    config = micro.config(folder, "whole", world=micro.world_config("high", "low"))
    micro.train(config)
    return config
