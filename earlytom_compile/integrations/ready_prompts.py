"""A prompt on its way from our ``generate()`` or ``forward()`` to the model's own method that makes prompts.

    with hand_over(compiled_model, prompt):
        own_generate(...)                   # calls the model's prompt method, where
                                            # take_ready(compiled_model) is prompt, once

Decoding steps call that method again, with nothing to put in. In a context variable: other threads have their own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..families.base import Prompt

_READY: ContextVar[tuple[Any, list[Prompt]] | None] = ContextVar("earlytom_ready_prompt", default=None)


@contextmanager
def hand_over(owner: Any, prompt: Prompt | None) -> Iterator[None]:
    """Inside, the next :func:`take_ready` of ``owner`` gets ``prompt``; None hands nothing over."""
    token = _READY.set(None if prompt is None else (owner, [prompt]))
    try:
        yield
    finally:
        _READY.reset(token)


def take_ready(owner: Any) -> Prompt | None:
    """What is there for ``owner``, the first time; None after that."""
    ready = _READY.get()
    return ready[1].pop() if ready is not None and ready[0] is owner and ready[1] else None
