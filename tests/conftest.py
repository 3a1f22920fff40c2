"""Every test starts with an empty compiler, unless it shares a trace, and fails on warnings it did not ask for."""

import gc
import os
import warnings
from functools import partial

import pytest
import torch
from effort import LONG, QUICK
from hypothesis import settings
from room_for_calls import with_room

# A suite that draws other inputs every time is green on one machine and red on the next. What `make test` draws is
# always the same; `make test-all` goes and looks for what nobody has seen yet.
settings.register_profile("quick", max_examples=QUICK, deadline=None, derandomize=True)
settings.register_profile("seeded", max_examples=QUICK, deadline=None, print_blob=True)
settings.register_profile("long", max_examples=LONG, deadline=None, print_blob=True)
settings.load_profile("quick")

if not torch.cuda.is_available():
    # The Triton providers are tested in Triton's interpreter, which must be chosen before anybody imports triton.
    os.environ["TRITON_INTERPRET"] = "1"
    # Inductor would start processes of its own, each of which imports torch, in every process that runs tests.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

# The width of pytest's own output, which pytest-xdist hands to its workers; tables are as wide as for anybody else.
os.environ.pop("COLUMNS", None)

from earlytom_compile import EarlyTomFallbackWarning, reporting  # noqa: E402
from earlytom_compile.integrations import prefill  # noqa: E402

# Tiny models have short prompts, which are to be compiled as those of a real one.
prefill.FEWEST_POSITIONS_ON_CPU = 2


def shares_a_trace(item):
    return "one_trace" in item.fixturenames


def pytest_itemcollected(item):
    item.setup, item.runtest = partial(with_room, item.setup), partial(with_room, item.runtest)


def pytest_collection_modifyitems(items):
    """``gpu(only=True)``: of no use without one. In each file, those that share a trace go before those that reset."""
    files = {path: place for place, path in enumerate(dict.fromkeys(item.path for item in items))}
    items.sort(key=lambda item: (files[item.path], not shares_a_trace(item)))
    if not torch.cuda.is_available():
        for item in items:
            if any(marker.kwargs.get("only") for marker in item.iter_markers("gpu")):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish():
    # What was imported stays. Python would go through all of it again and again while compilers make objects.
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def fresh_compiler(request):
    if not shares_a_trace(request.node):  # each compiles what it shares with a backend of its own
        torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    reporting._RECORDS.clear()
    with warnings.catch_warnings():
        # A test that does not expect a fallback must not pass by comparing uncompressed with uncompressed.
        warnings.simplefilter("error", EarlyTomFallbackWarning)
        # A cache has another name since transformers 5.24, and our own code must know it.
        warnings.filterwarnings("error", message=".*past_key_values", category=FutureWarning)
        yield
