"""Leaves out what the installed Triton cannot interpret."""

import torch


def _interpreter_works() -> bool:
    """Triton 3.6 interprets a loop over a number known at run time with an operation that numpy 2.4 dropped."""
    import numpy

    try:
        import triton
    except ImportError:
        return True  # its tests skip themselves
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    return not (old and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4))


collect_ignore_glob = [] if torch.cuda.is_available() or _interpreter_works() else ["test_triton_*", "test_host_*"]
