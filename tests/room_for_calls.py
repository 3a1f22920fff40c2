"""Calls that are deep are not slow.

CPython (3.11 to 3.13) keeps the frames of Python functions in pieces of 16 KiB: it maps a new one where a call does not
fit into the last, and unmaps it when that call returns. Dynamo calls deeply, and where what it calls again and again
lies on a border, a tiny model costs a million maps; on virtual machines, where a fresh page is dear, that is a quarter
of all the time that the suite takes.
"""

_WORDS = 2**17 + 2**10
"""Of a frame: a bit more than 1 MiB, for which CPython maps the next power of two; the rest is for what it calls."""


def with_room(call):
    """``call()``, with 1 MiB in one piece for the frames of all that it calls."""
    return call()


with_room.__code__ = with_room.__code__.replace(co_stacksize=_WORDS)
