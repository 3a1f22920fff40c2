"""A checkpoint with random weights that reads any text, for what needs no lmms-eval."""

import pytest
from tiny_checkpoint import TinySize, write_checkpoint

SMALL = TinySize(image=48, patch=8, vision_layers=4, vision_width=64, text_layers=2, text_width=64)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), SMALL)
