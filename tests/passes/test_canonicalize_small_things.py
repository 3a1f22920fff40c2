"""Sizes put together first, and splits into one part, are written plainly; what is more than that stays."""

import operator

import torch
from torch.fx import Graph, GraphModule

from earlytom_compile.passes.canonicalize_sizes import canonicalize_sizes
from earlytom_compile.passes.canonicalize_splits import canonicalize_splits


def test_sizes_become_arguments():
    graph = Graph()
    x = graph.placeholder("x")
    rows = graph.call_method("size", (x, 0))
    size = graph.call_function(torch.Size, ([rows, 6],))
    graph.output((graph.call_method("reshape", (x, size)), graph.call_method("view", (x,), {"size": size})))
    module, value = GraphModule(torch.nn.Module(), graph), torch.randn(4, 2, 3)
    expected = module(value)
    assert canonicalize_sizes(graph) == 1 and "Size" not in str(graph).split("return")[0]
    module.recompile()
    assert all(map(torch.equal, module(value), expected))
    assert canonicalize_sizes(graph) == 0


def split(parts, size, places):
    """A graph of ``torch.split`` whose parts at ``places`` are read, and what is recorded of it."""
    graph = Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.split, (x, size))
    node.meta["example_value"] = torch.zeros(parts * size, 2).split(size)
    graph.output(tuple(graph.call_function(operator.getitem, (node, place)) for place in places))
    return graph


def test_a_split_into_one_part_is_nothing():
    graph = split(1, 8, [0])
    assert canonicalize_splits(graph) == 1 and len(graph.nodes) == 2
    graph.lint()


def test_other_splits_stay():
    for graph in (split(2, 4, [0, 1]), split(1, 8, [slice(0, 1)])):
        before = str(graph)
        assert canonicalize_splits(graph) == 0 and str(graph) == before
