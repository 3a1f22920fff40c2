"""Writes into a tensor that nobody else holds become results; all others stay."""

import pytest
import torch
from tracing import trace

from earlytom_compile.passes.canonicalize_writes import canonicalize_writes
from earlytom_compile.passes.graph_order import eliminate_dead_code, writes


def added(x, y):
    r = x * 2
    r.add_(y, alpha=3.0)
    r.mul_(y)
    return r + 1


def added_by_operator(x, y):
    h = x.relu()
    h += y
    return h + x


def viewed(x, y):
    r = x * 2
    view = r.transpose(0, 1)
    r.add_(y)
    return view + 1


def of_the_caller(x, y):
    x.add_(y)
    return x + 1


def of_another_dtype(x, y):
    r = x * 2
    r.add_(y.double())
    return r + 1


def without_a_function(x, y):
    r = x * 2
    r.zero_()
    return r + y


CASES = {added: (2, 0), added_by_operator: (1, 0), viewed: (0, 1), of_the_caller: (0, 1), of_another_dtype: (0, 1)}
CASES[without_a_function] = 0, 1


@pytest.mark.parametrize("function", CASES, ids=lambda function: function.__name__)
def test_same_results(function):
    traced = trace(function, *torch.randn(2, 3, 3))
    expected = function(*(x.clone() for x in traced.inputs))
    graph, (rewritten, left) = traced.module.graph, CASES[function]
    assert canonicalize_writes(graph) == rewritten
    eliminate_dead_code(graph)
    assert sum(map(writes, graph.nodes)) == left
    traced.module.recompile()
    torch.testing.assert_close(traced.run(), expected)
