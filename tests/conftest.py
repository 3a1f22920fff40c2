"""Every test starts with an empty compiler and fails on warnings it did not ask for."""

import os
import warnings

import pytest
import torch

if not torch.cuda.is_available():
    # The Triton providers are tested in Triton's interpreter, which must be chosen before anybody imports triton.
    os.environ["TRITON_INTERPRET"] = "1"

from earlytom_compile import EarlyTomFallbackWarning, reporting  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    reporting._RECORDS.clear()
    with warnings.catch_warnings():
        # A test that does not expect a fallback must not pass by comparing uncompressed with uncompressed.
        warnings.simplefilter("error", EarlyTomFallbackWarning)
        # A cache has another name since transformers 5.24, and our own code must know it.
        warnings.filterwarnings("error", message=".*past_key_values", category=FutureWarning)
        yield
