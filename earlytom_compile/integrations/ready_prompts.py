"""A prompt on its way from our ``generate()`` or ``forward()`` to the model's own method that makes prompts.

    with hand_over(compiled_model, prompt) as handed:
        own_generate(...)                   # calls the model's prompt method, where
                                            # handed_to(compiled_model).take() is the prompt, once
    handed.prompt                           # None by then

Decoding steps call that method again, with nothing to put in. In a context variable: other threads have their own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from ..families.base import Prompt


@dataclass
class Handed:
    """What ``owner`` has decided of the call that is going on."""

    owner: Any
    prompt: Prompt | None
    """None: it has been taken, or the call is left alone."""

    def take(self) -> Prompt | None:
        """The prompt, the first time."""
        prompt, self.prompt = self.prompt, None
        return prompt


_HANDED: ContextVar[Handed | None] = ContextVar("earlytom_ready_prompt", default=None)


@contextmanager
def hand_over(owner: Any, prompt: Prompt | None) -> Iterator[Handed]:
    """Inside, :func:`handed_to` tells ``owner`` that this call is decided."""
    handed = Handed(owner, prompt)
    token = _HANDED.set(handed)
    try:
        yield handed
    finally:
        _HANDED.reset(token)


def handed_to(owner: Any) -> Handed | None:
    """What is decided of the call that is going on; None where nobody has looked at it."""
    handed = _HANDED.get()
    return handed if handed is not None and handed.owner is owner else None
