"""Captioned images and a pipeline to encode them."""

import shutil

import pytest


@pytest.fixture(scope="session")
def _tiny_pipeline(tmp_path_factory):
    from tests.helpers.captioned_images import write_pipeline

    return write_pipeline(tmp_path_factory.mktemp("captioned") / "pipeline")


@pytest.fixture
def captioned(tmp_path, _tiny_pipeline):
    """A folder with `images` and `pipeline`, which a test may change."""
    from tests.helpers.captioned_images import write_images

    shutil.copytree(_tiny_pipeline, tmp_path / "pipeline")
    write_images(tmp_path / "images")
    return tmp_path
