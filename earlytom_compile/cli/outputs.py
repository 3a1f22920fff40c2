"""Files that a measurement writes: whether they can be written is asked before anything is measured."""

import argparse
import tempfile
from pathlib import Path

from ..benchmarks.results import require_matplotlib
from ..errors import EarlyTomConfigError


def check_outputs(arguments: argparse.Namespace) -> None:
    """Make the folders of ``--json``, ``--markdown``, ``--trace``, ``--html``, ``--png`` and ``--plot``.

    Raises :class:`EarlyTomConfigError` for a place that cannot be written to, or for plots without matplotlib.
    """
    for name in ("json", "markdown", "trace", "html", "png"):
        path = getattr(arguments, name, None)
        if path:
            if Path(path).is_dir():
                raise EarlyTomConfigError(f"{name}={path!r}: that is a folder; name a file in it.")
            _require_folder(name, path, Path(path).parent)
    if getattr(arguments, "plot", None):
        require_matplotlib()
        _require_folder("plot", arguments.plot, Path(arguments.plot))


def _require_folder(name: str, given: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise EarlyTomConfigError(
            f"{name}={given!r}: nothing can be written to {str(folder)!r} ({error.strerror}); name another place."
        ) from error
