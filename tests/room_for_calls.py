"""Calls that are deep are not slow.

CPython (3.11 to 3.13) keeps the frames of Python functions in pieces of 16 KiB: it maps a new one where a call does not
fit into the last, and unmaps it when that call returns. Dynamo calls deeply, and what it calls again and again often
lies on such a border. ``pytest -k test_compresses tests/passes/test_spelled_towers.py`` on a virtual machine, where
fresh pages are dear: 1,067,000 calls of mmap and 69 s; with room 15,000 and 49 s (Python 3.11.2, torch 2.14.1,
2026-12-01).
"""

_WORDS = 2**17 + 2**10
"""Of a frame: a bit more than 1 MiB, for which CPython maps the next power of two; the rest is for what it calls."""


def with_room(call):
    """``call()``, with 1 MiB in one piece for the frames of all that it calls."""
    return call()


with_room.__code__ = with_room.__code__.replace(co_stacksize=_WORDS)
