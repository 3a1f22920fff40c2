"""``torch.compile`` with everything but Inductor: Dynamo's graphs run as they were captured.

What looks at names, shapes, tables and files of compiled models proves the same, in a tenth of the time. What Inductor
makes of a graph is for tests that compare it with something.
"""

import pytest
import torch

from earlytom_compile import backend, stages


def leave_graphs_as_they_are(patch: pytest.MonkeyPatch) -> None:
    """Until ``patch`` is undone, Inductor gives back what it gets; modes and options are still checked."""
    patch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, graph, inputs: graph.forward)
    leave_pieces_as_they_are(patch)


def leave_pieces_as_they_are(patch: pytest.MonkeyPatch) -> None:
    """Until ``patch`` is undone, what our passes make of a graph is cut into pieces, and those run as they are."""
    for module in (stages, backend):
        patch.setattr(module, "lower", lambda graph_module, *args: graph_module.forward)
