"""Going on where Ctrl-C stopped: what ``--json`` saved, if it is of the same measurement on the same machine.

about = {**environment(device), "asked": {...}}
saved_content(arguments, about)      # {} without --resume, else what the file has
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import EarlyTomConfigError
from .outputs import STANDARD_OUTPUT

_MAY_DIFFER = ("command", "date", "seconds", "changed")


def check_resume(arguments: argparse.Namespace) -> None:
    """Raise :class:`EarlyTomConfigError` where there is no file that could be gone on with."""
    if arguments.resume and (not arguments.json or arguments.json == STANDARD_OUTPUT):
        raise EarlyTomConfigError("--resume without --json FILE: name the file in which the beginning was saved.")


def saved_content(arguments: argparse.Namespace, about: dict[str, Any], progress_on: Console) -> dict[str, Any]:
    """What was saved before; empty where nothing is to be gone on with.

    ``about``: what the numbers depend on. Raises :class:`EarlyTomConfigError` for a file of another measurement: its
    numbers and new ones would stand in one table and not be comparable.
    """
    file = Path(arguments.json) if arguments.resume else None
    if file is None:
        return {}
    if not file.is_file():
        progress_on.print(f"{file} is not there yet: all begins anew.", markup=False, soft_wrap=True)
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EarlyTomConfigError(f"--resume: {str(file)!r} is no JSON of this command: {error}.") from error
    for name, now in json.loads(json.dumps(about)).items():
        before = content.get(name) if isinstance(content, dict) else None
        if not _equal(before, now) and name not in _MAY_DIFFER:
            raise EarlyTomConfigError(f"--resume: {_difference(str(file), name, before, now)}")
    return content


def _equal(before: Any, now: Any) -> bool:
    """An option that was given as None is one that was not given."""
    if isinstance(before, dict) and isinstance(now, dict):
        return all(before.get(key) == now.get(key) for key in {**before, **now})
    return before == now


def _difference(file: str, name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        name = next(key for key in {**now, **before} if before.get(key) != now.get(key))
        before, now = before.get(name), now.get(name)
    return (
        f"{file!r} was made with {name}={before!r}, and this would be {name}={now!r}; rows of both do not belong into "
        "one table. Begin anew in another file, or without --resume."
    )


def stopped(arguments: argparse.Namespace, saved: str) -> KeyboardInterrupt:
    """What to raise at Ctrl-C; ``saved`` says what is in the file by now, if anything."""
    if not arguments.json or arguments.json == STANDARD_OUTPUT:
        return KeyboardInterrupt("nothing was saved. With --json FILE, all that is finished would be, for --resume.")
    if not saved:
        return KeyboardInterrupt(f"nothing was finished yet that {arguments.json} could have.")
    return KeyboardInterrupt(f"{arguments.json} has {saved}; the same command with --resume goes on from there.")
