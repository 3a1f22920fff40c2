"""A checkpoint folder and a video file, as a user has them; made once for all tests of a process."""

import pytest
from clip import write_clip
from tiny_checkpoint import TinySize, write_checkpoint

from earlytom_compile.cli.main import main

SMALL = TinySize(image=48, patch=8, vision_layers=4, vision_width=64, text_layers=2, text_width=64)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), SMALL)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_clip(path)
    return path


@pytest.fixture
def earlytom(capsys):
    """The command, called with words: (status, what it printed, what it said beside)."""

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
