"""Files that a command writes: whether they can be written is asked before the work, and they are whole at any time.

check_outputs(arguments)                    # --json results/run.json: folder "results" is there, the file as it was
write_text(arguments.json, "{}")            # in one step; "-" is the standard output
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from ..errors import EarlyTomConfigError

FILES = ("json", "markdown", "trace", "html", "png", "output")
"""Options that name a file."""
FOLDERS = ("plot", "save")
INPUTS = ("video", "questions")
STANDARD_OUTPUT = "-"
_FILE_WIDTH = 120  # columns, where nobody watches


def check_outputs(arguments: argparse.Namespace) -> None:
    """Try to write where something is to be written. A folder that is asked for is made later, but none above it.

    Raises :class:`EarlyTomConfigError` for a place that cannot be written to or whose folder is not there, for one that
    something else is read from or written to, for plots without matplotlib, or if the standard output is closed.
    """
    if sys.stdout is None:
        raise EarlyTomConfigError("the standard output is closed, and answers would be lost: send it to a file.")
    taken = dict(_inputs(arguments))
    for name in FILES:
        path = getattr(arguments, name, None)
        if not path or (path == STANDARD_OUTPUT and name == "json"):
            continue
        if path == STANDARD_OUTPUT:
            raise EarlyTomConfigError(f"{name}={path!r}: only json goes to the standard output; name a file.")
        other = taken.setdefault(Path(path).resolve(), name)
        if other != name:
            raise EarlyTomConfigError(f"{name}={path!r}: that is the file of {other}; name another one.")
        _require_writable(name, path)
    if getattr(arguments, "plot", None):
        from ..benchmarks.result_plots import require_matplotlib  # which imports torch; `earlytom flops` needs none

        require_matplotlib()
    for name in FOLDERS:
        path = getattr(arguments, name, None)
        if path:
            _require_folder(name, path)


def _inputs(arguments: argparse.Namespace) -> Iterator[tuple[Path, str]]:
    """The files that are read, and the options that name them."""
    for name in INPUTS:
        given = getattr(arguments, name, None) or []
        for path in [given] if isinstance(given, str) else given:
            yield Path(path).resolve(), name


def output_console(arguments: argparse.Namespace, *, width: int = _FILE_WIDTH) -> Console:
    """Where tables go: the standard output, unless ``--json -`` has taken it.

    As wide as the terminal; if nobody watches, as the variable COLUMNS says, else ``width`` columns.
    """
    stderr = getattr(arguments, "json", None) == STANDARD_OUTPUT
    console = Console(highlight=False, stderr=stderr)
    if console.is_terminal:
        return console
    columns = os.environ.get("COLUMNS", "")
    return Console(highlight=False, stderr=stderr, width=columns.isdecimal() and int(columns) or width)


def write_text(path: str | Path, text: str) -> None:
    """Put ``text`` there: all of it or, if somebody stops the program now, nothing.

    Raises :class:`EarlyTomConfigError` for a file that cannot be written, such as on a disk that is full.
    """
    if str(path) == STANDARD_OUTPUT:
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    file = Path(path).resolve()  # behind a link, whose place the new file would take
    try:
        if file.exists() and not file.is_file():  # a pipe, /dev/null
            file.write_text(text, encoding="utf-8")
            return
        new = file.with_name(file.name + ".new")
        new.write_text(text, encoding="utf-8")
        os.replace(new, file)
    except OSError as error:
        raise EarlyTomConfigError(f"{str(path)!r} cannot be written ({error.strerror}).") from error


def _require_writable(name: str, given: str) -> None:
    """Try the file itself, and leave it as it was: not there, or with what it had."""
    file = Path(given)
    with _plain_errors(name, given):
        there = file.exists()
        if file.is_dir():
            raise EarlyTomConfigError(f"{name}={given!r}: that is a folder; name a file in it.")
        _require_parent(name, given)
        with file.open("ab"):
            pass
        if not there:
            file.unlink()
            # write_text writes beside it first
            beside = file.with_name(file.name + ".new")
            beside.touch()
            beside.unlink()


def _require_folder(name: str, given: str) -> None:
    """Try a file in it, and leave it as it was: not there, or with what it had."""
    folder = Path(given)
    with _plain_errors(name, given):
        there = folder.exists()
        if not there:
            _require_parent(name, given)
            folder.mkdir()
        try:
            (folder / "tried").touch()
            (folder / "tried").unlink()
        finally:
            if not there:
                folder.rmdir()


def _require_parent(name: str, given: str) -> None:
    parent = Path(given).parent
    if not parent.exists():
        raise EarlyTomConfigError(
            f"{name}={given!r}: there is no folder {str(parent)!r}; make it, or name another place."
        )


@contextmanager
def _plain_errors(name: str, given: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EarlyTomConfigError(
            f"{name}={given!r}: nothing can be written there ({error.strerror}); name another place."
        ) from error
