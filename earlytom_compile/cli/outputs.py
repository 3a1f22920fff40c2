"""Files that a command writes: whether they can be written is asked before the work, and they are whole at any time.

check_outputs(arguments)                    # --json results/run.json: the folder is there now, the file as it was
write_text(arguments.json, "{}")            # in one step; "-" is the standard output
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from ..errors import EarlyTomConfigError

FILES = ("json", "markdown", "trace", "html", "png")
"""Options that name a file."""
FOLDERS = ("plot", "save")
INPUTS = ("video", "questions")
STANDARD_OUTPUT = "-"
_FILE_WIDTH = 120  # columns, where nobody watches


def check_outputs(arguments: argparse.Namespace) -> None:
    """Make the folders of what is to be written, and try to write there.

    Raises :class:`EarlyTomConfigError` for a place that cannot be written to, for one that something else is read from
    or written to, or for plots without matplotlib.
    """
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
        from ..benchmarks.results import require_matplotlib  # which imports torch; `earlytom flops` needs none

        require_matplotlib()
    for name in FOLDERS:
        path = getattr(arguments, name, None)
        if path:
            _require_writable(name, path, inside="tried")


def _inputs(arguments: argparse.Namespace) -> Iterator[tuple[Path, str]]:
    """The files that are read, and the options that name them."""
    for name in INPUTS:
        given = getattr(arguments, name, None) or []
        for path in [given] if isinstance(given, str) else given:
            yield Path(path).resolve(), name


def output_console(arguments: argparse.Namespace, *, width: int = _FILE_WIDTH) -> Console:
    """Where tables go: the standard output, unless ``--json -`` has taken it; ``width`` columns if nobody watches."""
    console = Console(highlight=False, stderr=arguments.json == STANDARD_OUTPUT)
    if not console.is_terminal:
        console = Console(highlight=False, stderr=arguments.json == STANDARD_OUTPUT, width=width)
    return console


def write_text(path: str | Path, text: str) -> None:
    """Put ``text`` there: all of it or, if somebody stops the program now, nothing."""
    if str(path) == STANDARD_OUTPUT:
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    file = Path(path).resolve()  # behind a link, whose place the new file would take
    if file.exists() and not file.is_file():  # a pipe, /dev/null
        file.write_text(text, encoding="utf-8")
        return
    new = file.with_name(file.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, file)


def _require_writable(name: str, given: str, inside: str = "") -> None:
    """Try the file itself, and leave it as it was: not there, or with what it had."""
    file = Path(given) / inside
    try:
        there = file.exists()
        if file.is_dir():
            raise EarlyTomConfigError(f"{name}={given!r}: that is a folder; name a file in it.")
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab"):
            pass
        if not there:
            file.unlink()
            # write_text writes beside it first
            beside = file.with_name(file.name + ".new")
            beside.touch()
            beside.unlink()
    except OSError as error:
        raise EarlyTomConfigError(
            f"{name}={given!r}: nothing can be written there ({error.strerror}); name another place."
        ) from error
