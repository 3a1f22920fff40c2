"""A tiny model that each file of tests makes once and traces once."""

import pytest
from generating import share_vision_paths, trace_of_video_rows
from tiny_models import tiny_llava_onevision

import earlytom_compile
from earlytom_compile import reporting


@pytest.fixture(scope="module")
def pristine():
    return tiny_llava_onevision(vision_layers=4, text_layers=1)


@pytest.fixture(scope="module")
def one_trace():
    return trace_of_video_rows()


@pytest.fixture
def shared_vision(one_trace, monkeypatch):
    """Whatever is compiled shares traces, and what comes of them."""
    share_vision_paths(one_trace, monkeypatch)


@pytest.fixture
def model(pristine, shared_vision):
    yield pristine
    earlytom_compile.restore(pristine)
    reporting._RESTORED.clear()


@pytest.fixture
def unshared(pristine):
    """The same model, which traces for itself."""
    yield pristine
    earlytom_compile.restore(pristine)
