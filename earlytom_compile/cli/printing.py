"""The standard output, told apart from everything else that can fail.

with checked_output():
    print("an answer")          # the disk is full: Unwritten("No space left on device")
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class Unwritten(Exception):
    """What was printed cannot be written; says why. No ``OSError``: libraries pass over those, or raise them too."""


@contextlib.contextmanager
def checked_output() -> Iterator[None]:
    """What is printed within is written at its end; raises :class:`Unwritten`, and ``BrokenPipeError`` as ever."""
    if sys.stdout is None:  # closed
        yield
        return
    checked: Any = _Checked(sys.stdout)
    with contextlib.redirect_stdout(checked):
        try:
            yield
        finally:  # help ends in SystemExit
            checked.flush()


def discard_output() -> None:
    """To be called when nothing more can be written: Python would try once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Checked:
    """A stream, but for its errors."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with _told():
            return int(self._stream.write(text))

    def flush(self) -> None:
        with _told():
            self._stream.flush()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Unwritten(error.strerror) from error
