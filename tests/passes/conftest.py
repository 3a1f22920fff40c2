"""The plain video model after all passes, for tests that only look at the graph."""

import pytest
from hand_made import VideoModel, rewrite
from one_trace import OneTrace


@pytest.fixture(scope="module")
def plain():
    return VideoModel().eval()


@pytest.fixture(scope="module")
def one_trace(plain):
    return OneTrace(plain)


@pytest.fixture
def rewritten(plain, one_trace):
    """``rewritten(frames=8, **options)``: as :func:`rewrite`, but Dynamo traces each number of frames once."""

    def rewrite_plain(frames=8, **options):
        return rewrite(plain, plain.example(frames=frames), one_trace.through, **options)

    return rewrite_plain
