"""Skips what the installed Triton cannot interpret."""

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch


def _release(package: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, version(package).split(".")[:2]))
    except PackageNotFoundError:
        return (99, 0)  # its tests skip themselves


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() or _release("triton") >= (3, 7) or _release("numpy") < (2, 4):
        return
    reason = "the interpreter of Triton 3.6 runs loops with an operation that numpy 2.4 dropped"
    for item in items:
        if item.path.name.startswith(("test_triton_", "test_host_")):
            item.add_marker(pytest.mark.skip(reason=reason))
