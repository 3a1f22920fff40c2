"""One trace of video paths for all models of a test file, since tracing them takes longer than the tests."""

import pytest
from generating import share_vision_paths, trace_of_video_rows

import earlytom_compile


@pytest.fixture(scope="module")
def one_trace():
    return trace_of_video_rows()


@pytest.fixture(scope="module")
def sharing(one_trace):
    with pytest.MonkeyPatch.context() as patch:
        share_vision_paths(one_trace, patch)
        yield


@pytest.fixture
def model(pristine, one_trace, monkeypatch):
    """That of the file, which has a fixture ``pristine``, traced once for all tests."""
    share_vision_paths(one_trace, monkeypatch)
    yield pristine
    earlytom_compile.restore(pristine)


@pytest.fixture
def unshared(pristine):
    """The same model, which traces for itself."""
    yield pristine
    earlytom_compile.restore(pristine)
