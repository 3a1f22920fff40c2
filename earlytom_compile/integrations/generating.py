"""Whether a call of ``forward()`` comes from within a ``generate()`` that has looked at the video already.

with generating(left_a_video=False):
    output = own_generate(...)          # forward() in it asks within_generate()
return each_step(output, ...)           # and so it does in every step of a generator
"""

import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from contextvars import ContextVar
from typing import Any

_GENERATING: ContextVar[bool | None] = ContextVar("earlytom_generating", default=None)


def within_generate() -> bool | None:
    """None outside of it; inside, whether ``generate()`` has left a video alone."""
    return _GENERATING.get()


@contextmanager
def generating(left_a_video: bool) -> Iterator[None]:
    """Inside, features that reach ``forward`` are those of ``generate``, which encodes before the prompt's pass; and a
    video that ``generate`` has left alone, with a warning, ``forward`` leaves alone."""
    token = _GENERATING.set(left_a_video)
    try:
        yield
    finally:
        _GENERATING.reset(token)


def each_step(output: Any, context: Callable[[], AbstractContextManager[None]]) -> Any:
    """``output``; if that is a generator, which has only begun, one whose every step runs in ``context``."""
    return _stepping(output, context) if inspect.isgenerator(output) else output


def _stepping(steps: Generator[Any, Any, Any], context: Callable[[], AbstractContextManager[None]]) -> Iterator[Any]:
    with closing(steps):
        while True:
            with context():
                try:
                    value = next(steps)
                except StopIteration:
                    return
            yield value
