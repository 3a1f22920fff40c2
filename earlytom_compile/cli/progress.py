"""What is being done, for whoever waits: bars on a terminal, and elsewhere a line for each step that takes long.

with progress_bars(Console(stderr=True)) as progress:
    progress.add_task("loading the weights", total=None)
    ...                                     # after 2 s, into a file:  loading the weights ...
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID, TimeElapsedColumn

LONG_STEP = 2.0
"""Seconds after which a step is worth a line."""
REMINDER = 60.0
"""Seconds between further lines about the same step."""


class Steps(Progress):
    """rich's ``Progress``; where it can draw no bars, it prints a line for a task that takes longer than LONG_STEP."""

    def __init__(self, console: Console) -> None:
        self._lines = not console.is_terminal
        self._step: object = None
        columns = (*Progress.get_default_columns(), TimeElapsedColumn())
        super().__init__(*columns, console=console, transient=True, disable=self._lines)

    def add_task(self, description: str, *args: Any, **fields: Any) -> TaskID:
        """Begin a step."""
        task = super().add_task(description, *args, **fields)
        self._begin(description)
        return task

    def update(self, task_id: TaskID, **fields: Any) -> None:  # type: ignore[override]
        """Change a step; another ``description`` is another step."""
        super().update(task_id, **fields)
        if fields.get("description") is not None:
            self._begin(fields["description"])

    def stop(self) -> None:
        """All steps are over."""
        self._step = None
        super().stop()

    def _begin(self, description: str) -> None:
        self._step = step = object()
        if self._lines:
            self._tell_after(LONG_STEP, description, step, 0.0)

    def _tell_after(self, seconds: float, description: str, step: object, before: float) -> None:
        def tell() -> None:
            if self._step is step:
                passed = f" ({before + seconds:.0f} s)" if before else ""
                self.console.print(f"{description} ...{passed}", markup=False, highlight=False, soft_wrap=True)
                self._tell_after(REMINDER, description, step, before + seconds)

        timer = threading.Timer(seconds, tell)
        timer.daemon = True  # what is told must not keep the program alive
        timer.start()


def progress_bars(console: Console) -> Steps:
    """Bars that vanish when done, or lines for long steps; nothing on a console that is quiet."""
    return Steps(console)


@contextmanager
def step(console: Console, description: str) -> Iterator[None]:
    """One step of which nobody knows how far it is."""
    with progress_bars(console) as progress:
        progress.add_task(description, total=None)
        yield
