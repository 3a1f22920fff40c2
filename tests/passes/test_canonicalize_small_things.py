"""Sizes put together first, splits into one part and features scattered as they are, are written plainly; what is more
than that stays."""

import operator

import pytest
import torch
from torch.fx import Graph, GraphModule
from tracing import trace

from earlytom_compile.passes.canonicalize_scatters import canonicalize_scatters
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


def tokens(pixels):
    """[..., C, H, W] -> [N, H * W, C]"""
    return pixels.flatten(0, -4).flatten(2).transpose(1, 2)


def scattered(embeds, mask, pixels):
    return embeds.masked_scatter(mask, tokens(pixels))


def rows_scattered(embeds, mask, pixels):
    return embeds.masked_scatter(mask, tokens(pixels).flatten(0, 1))


def scattered_into(embeds, mask, pixels):
    return pixels.masked_scatter(pixels > 2, embeds)


@pytest.mark.parametrize(
    "function, shape, rewritten",
    [
        (scattered, (2, 3, 4, 5, 5), 1),
        (scattered, (6, 4, 5, 5), 0),  # images
        (rows_scattered, (2, 3, 4, 5, 5), 0),
        (scattered_into, (2, 3, 4, 5, 5), 0),
    ],
)
def test_features_of_videos_are_scattered_as_rows(function, shape, rewritten):
    mask = (torch.arange(160) % 3 > 0)[None, :, None]
    inputs = torch.randn(1, 160, 4), mask, torch.randn(shape)
    traced, expected = trace(function, *inputs), function(*inputs)
    assert canonicalize_scatters(traced.module.graph) == rewritten
    assert canonicalize_scatters(traced.module.graph) == 0
    traced.module.graph.lint()
    traced.module.recompile()
    assert torch.equal(traced.run(), expected)
    (scatter,) = traced.called("masked_scatter")
    assert (scatter.args[2].target == "flatten") == (rewritten == 1 or function is rows_scattered)
    assert scatter.args[2].meta["example_value"].dim() == (2 if rewritten or function is rows_scattered else 3)
