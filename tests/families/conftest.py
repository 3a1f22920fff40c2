"""One trace of video paths for all models of a test file, since tracing them takes longer than the tests."""

import pytest
from generating import share_vision_paths, trace_of_video_rows


@pytest.fixture(scope="module")
def one_trace():
    return trace_of_video_rows()


@pytest.fixture(scope="module")
def sharing(one_trace):
    with pytest.MonkeyPatch.context() as patch:
        share_vision_paths(one_trace, patch)
        yield
