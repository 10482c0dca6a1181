"""One data set and one uninterrupted run for all tests of this folder."""

import pytest

from tests.training import micro


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    micro.make_data(folder)
    return folder


@pytest.fixture(scope="session")
def whole(folder):
    """The config of a run of two experts over two phases that nothing interrupted."""
    config = micro.config(folder, "whole", world=micro.world_config("high", "low"))
    micro.train(config)
    return config
