"""Every test starts with an empty compiler and fails on warnings it did not ask for."""

import warnings

import pytest
import torch

from earlytom_compile import EarlyTomFallbackWarning, reporting


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    reporting._RECORDS.clear()
    with warnings.catch_warnings():
        # A test that does not expect a fallback must not pass by comparing uncompressed with uncompressed.
        warnings.simplefilter("error", EarlyTomFallbackWarning)
        yield
