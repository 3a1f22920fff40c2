"""Can Inductor compile for this device? Asked first: its own failure comes late, as a long traceback.

missing_toolchain(torch.device("cpu"))   # -> "no C++ compiler (g++) was found", or None if all is there
"""

import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from ..errors import EarlyTomConfigError


def missing_toolchain(device: torch.device) -> str | None:
    """What Inductor lacks to compile for ``device``; on a CPU it writes C++ with Python bindings."""
    if device.type != "cpu":
        return None
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "no C++ compiler was found: install g++ or clang++, or name one in CXX"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python.h was not found: install Python's headers, such as the package python3-dev"
    return None


def require_toolchain(
    device: torch.device,
    options: dict[str, Any],
    *,
    otherwise: str = "--lowering eager, which compresses without compiling",
) -> None:
    """Raise :class:`EarlyTomConfigError` if ``options`` ask for Inductor and it cannot compile here."""
    missing = missing_toolchain(device)
    if missing and options.get("lowering") != "eager":
        raise EarlyTomConfigError(f"{missing}; or give {otherwise}.")
