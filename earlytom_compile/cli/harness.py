"""lmms-eval inside this process: its tasks by name, one evaluation at a time, and its noise kept off our tables.

    harness = Harness(include_path=None)
    harness.require_tasks(["mvbench", "videome"])     # EarlyTomConfigError: no task 'videome'; near: videomme, ...
    harness.evaluate(model, "mvbench", limit=None)    # what lmms_eval.evaluator.simple_evaluate returns

lmms-eval is imported when it is needed, and only here.
"""

import contextlib
import difflib
import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import EarlyTomConfigError, EarlyTomError
from ..integrations.checkpoint_files import in_one_line
from ..words import sentence, what_ended

INSTALL = "pip install '.[eval]' in the repository brings it"
_NAME = "earlytom"
"""What tasks call the model whose prompts they write: none has any of its own for it, so theirs for all models."""
_NEAR = 5

logger = logging.getLogger(__name__)


def require_lmms_eval() -> str:
    """The version that is installed; raises :class:`EarlyTomConfigError` without any."""
    found = importlib.util.find_spec("lmms_eval")
    if found is None or found.origin is None:  # a folder that is only called so
        raise EarlyTomConfigError(f"--tasks runs lmms-eval, which is not installed: {INSTALL}.")
    try:
        return importlib.metadata.version("lmms-eval")
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path
        return "unknown"


class Harness:
    """lmms-eval's tasks, and those of ``include_path``, a folder of tasks of one's own.

    Raises :class:`EarlyTomConfigError` where lmms-eval cannot be imported or its tasks not be read.
    """

    def __init__(self, include_path: str | None = None) -> None:
        if include_path is not None and not Path(include_path).is_dir():
            raise EarlyTomConfigError(f"include_path={include_path!r}: must be a folder with YAML files of tasks.")
        with _told("lmms-eval"), quiet():
            self._evaluator = importlib.import_module("lmms_eval.evaluator")
            self._tasks = importlib.import_module("lmms_eval.tasks")
            self._manager = self._tasks.TaskManager("WARNING", include_path=include_path, model_name=_NAME)

    def require_tasks(self, names: Sequence[str]) -> None:
        """Raise :class:`EarlyTomConfigError` for names that are no tasks, with those that are near."""
        for name in names:
            if name not in self._manager.all_tasks:
                near = difflib.get_close_matches(name, self._manager.all_tasks, n=_NEAR, cutoff=0.6)
                hint = f"; near: {', '.join(near)}" if near else ""
                raise EarlyTomConfigError(
                    f"lmms-eval has no task {name!r}{hint}. 'python -m lmms_eval --tasks list' lists all; "
                    "--include-path DIR adds some of your own."
                )

    def look_at(self, name: str) -> None:
        """Load a task, which fetches its videos where they are not here yet; raises :class:`EarlyTomConfigError`."""
        with _told(name), quiet():
            self._tasks.get_task_dict([name], self._manager, "simple")

    def evaluate(self, model: Any, name: str, *, limit: int | None, said: str) -> dict[str, Any]:
        """Ask ``model``, an ``lmms`` of lmms-eval, everything of one task.

        ``limit``: only the first so many questions, of a group so many of each task. ``said``: what an error calls this
        evaluation. Raises :class:`EarlyTomConfigError` for whatever goes wrong in it.
        """
        with _told(said), quiet():
            return self._evaluator.simple_evaluate(
                model=model, tasks=[name], limit=limit, task_manager=self._manager, verbosity="WARNING"
            )


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Whatever a task's own code raises, ``sys.exit`` included, becomes one sentence that begins with ``what``."""
    try:
        yield
    except EarlyTomError as error:
        raise EarlyTomConfigError(sentence(f"{what}: {error}")) from error
    except SystemExit as exit:
        raise EarlyTomConfigError(sentence(f"{what}: {what_ended(exit)}")) from exit
    except Exception as raised:
        logger.debug("%s", what, exc_info=True)
        found = _behind_retries(raised)
        causes = [found, found.__cause__] if isinstance(found.__cause__, Exception) else [found]
        told = ", because of ".join(f"{type(cause).__name__}: {in_one_line(cause)}" for cause in causes)
        raise EarlyTomConfigError(sentence(f"{what}: {told}")) from raised


def _behind_retries(error: Exception) -> Exception:
    """What the last of several tries raised: lmms-eval tries each scoring of an answer five times."""
    retries = getattr(sys.modules.get("tenacity"), "RetryError", ())
    while isinstance(error, retries) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What lmms-eval prints goes to the standard error, and of what it logs only warnings and worse."""
    loguru = importlib.import_module("loguru").logger
    loguru.remove()
    loguru.add(lambda message: sys.stderr.write(message), level="WARNING", format="{level}: {message}")
    with contextlib.redirect_stdout(sys.stderr):
        yield
