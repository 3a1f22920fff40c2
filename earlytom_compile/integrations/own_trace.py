"""Whether it is our own video path that Dynamo traces right now.

    with tracing_video():
        rows = compiled_path(model, video)

Some of what surrounds a model has to look different to Dynamo while it traces that path: the tower's attention
(attention_choice.py), accelerate's hooks (placement.py). They ask here. The answer is no for eager code, for images,
for other threads and for everybody else who uses ``torch.compile`` in the process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_CHANGED: ContextVar[set[str] | None] = ContextVar("earlytom_tracing_video", default=None)  # None = not ours


@contextmanager
def tracing_video() -> Iterator[None]:
    """What Dynamo traces in here, in this thread, is the video path of a model."""
    token = _CHANGED.set(set())
    try:
        yield
    finally:
        _CHANGED.reset(token)


def changed_in_trace() -> str:
    """For the report, while a backend compiles what was traced in here: what was changed for it."""
    return "".join(f", {what}" for what in sorted(_CHANGED.get() or ()))


@torch._dynamo.assume_constant_result
def is_video_path(change: str = "") -> bool:
    """Asked by traced code, answered outside the trace; ``change`` is what the caller does if so, for the report.

    Needs no guard: compiled functions of our own are called inside :func:`tracing_video` alone, all others outside it.
    """
    changed = _CHANGED.get()
    if changed is not None and change:
        changed.add(change)
    return changed is not None
