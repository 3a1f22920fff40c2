"""No call maps memory for its frame where there is room."""

import pytest
from room_for_calls import with_room

resource = pytest.importorskip("resource", reason="needs a system that counts page faults")
CALLS, DEPTH = 100, 200


def calls_at(depth):
    """``CALLS`` calls from each of ``DEPTH`` depths, of which some lie on a border between two pieces."""
    for _ in range(CALLS):
        some_frame()
    if depth:
        calls_at(depth - 1)


def some_frame():
    a = b = c = d = e = f = g = None
    return a, b, c, d, e, f, g


def page_faults(call):
    call()  # what is touched for the first time
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_deep_calls_map_no_memory():
    assert page_faults(lambda: with_room(lambda: calls_at(DEPTH))) < CALLS
