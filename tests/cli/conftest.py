"""A checkpoint folder and a video file, as a user has them; made once for all tests of a process."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from clip import write_clip
from generating import share_vision_paths, trace_of_video_rows
from tiny_checkpoint import TinySize, write_checkpoint

import earlytom_compile
from earlytom_compile.cli import loading
from earlytom_compile.cli.main import main
from earlytom_compile.integrations import observe
from earlytom_compile.integrations.vision_path import traced_arguments

SMALL = TinySize(image=48, patch=8, vision_layers=4, vision_width=64, text_layers=2, text_width=64)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), SMALL)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_clip(path)
    return path


@pytest.fixture(scope="module")
def one_trace():
    return trace_of_video_rows()


@pytest.fixture(scope="module")
def shared(one_trace):
    """A context in which commands read a checkpoint once and trace it once: with a tiny model that is most of their
    work. Each still compiles and observes with options of its own."""
    read, models = loading._read_weights, {}

    def read_once(name, config, *place):
        if (name, *place) not in models:
            models[name, *place] = read(name, config, *place)
        return earlytom_compile.restore(models[name, *place])

    @contextmanager
    def sharing():
        traced = SimpleNamespace(**{**vars(torch), "compile": lambda function, backend: one_trace.through(backend)})
        with pytest.MonkeyPatch.context() as patch:
            share_vision_paths(one_trace, patch)
            patch.setattr(observe, "torch", traced)
            patch.setattr(observe, "traced_arguments", lambda video, any_length: traced_arguments(video, True))
            patch.setattr(loading, "_read_weights", read_once)
            yield

    return sharing


@pytest.fixture
def sharing(shared):
    with shared():
        yield


@pytest.fixture
def earlytom(capsys):
    """The command, called with words: (status, what it printed, what it said beside)."""

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
