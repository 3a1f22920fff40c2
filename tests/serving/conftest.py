"""Engines run in processes of their own: the compiler of this one is not theirs."""

from pathlib import Path

import pytest

import earlytom_compile.toyworld


@pytest.fixture(scope="session")
def toy():
    """The toy world's trained checkpoint."""
    return Path(earlytom_compile.toyworld.__path__[0]) / "weights"
