"""What a number needs beside it: the machine, the versions, the date and the command.

environment(torch.device("cpu"))   ->   {"machine": "AMD EPYC 9654, 2 threads", "torch": "2.13.0+cpu", ...}
"""

import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from earlytom_compile.words import counted

_HERE = Path(__file__).parent
_CPU_INFO = Path("/proc/cpuinfo")


def environment(device: torch.device) -> dict[str, Any]:
    """By name; what does not apply to ``device`` or is not known is left out."""
    known = {
        "machine": _gpu(device) or f"{_processor()}, {counted(torch.get_num_threads(), 'thread')}",
        "earlytom": _version("earlytom-compile"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed": "files differ from the commit" if _git("status", "--porcelain", "-uno") else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": _version("triton") if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "driver": _driver() if device.type == "cuda" else None,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": _command(sys.orig_argv),
    }
    return {name: value for name, value in known.items() if value is not None}


def _command(arguments: Sequence[str]) -> str:
    """As somebody would type it: ``earlytom bench``, ``python -m earlytom_compile.benchmarks.kernels``."""
    _, *rest = arguments
    if rest and Path(rest[0]).name == "earlytom":
        return shlex.join(["earlytom", *rest[1:]])
    return shlex.join(["python", *rest])


def _gpu(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def _processor() -> str:
    """The model where Linux tells it, else the architecture."""
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says of the checkout this file lies in; None for an installed one, which the version stands for."""
    if (_HERE.parent / ".git").exists():
        return _output("git", "-C", str(_HERE), *arguments)
    return None


def _driver() -> str | None:
    said = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return said.splitlines()[0] if said else None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
