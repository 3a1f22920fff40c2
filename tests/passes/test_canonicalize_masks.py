"""Masks as transformers before 4.56 write them: made by vmap of pairs of positions, or cut to size in every layer."""

import pytest
import torch
import torch.nn.functional as F
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from tracing import trace

from earlytom_compile.passes.canonicalize_masks import canonicalize_masks
from earlytom_compile.passes.canonicalize_vmap import canonicalize_vmap
from earlytom_compile.passes.patterns import value_of

MASKS = {
    "causal": lambda seen, row, query, key: key <= query,
    "window": lambda seen, row, query, key: (key <= query) & (key > query - 3),
    "chunks": lambda seen, row, query, key: ~(key // 4 != query // 4),
    "each row its own": lambda seen, row, query, key: (key + row).lt(query) | (query == 0),
    "all": lambda seen, row, query, key: query.new_ones((), dtype=torch.bool),
    "padded": lambda seen, row, query, key: (
        query.new_ones((), dtype=torch.bool) & (key <= query) & torch.ops.aten.index(seen, [row, key]).to(torch.bool)
    ),
}


def by_vmap(mask, seen, *axes):
    """``mask`` of every combination of the numbers in ``axes``, the last of which is innermost."""

    def of_numbers(*numbers):
        return mask(seen, numbers[0], *numbers[-2:])

    for axis in reversed(range(len(axes))):
        of_numbers = torch.vmap(of_numbers, in_dims=tuple(0 if i == axis else None for i in range(len(axes))))
    return of_numbers(*axes)


def by_loops(mask, seen, rows, queries, keys):
    return [
        [[bool(mask(seen, torch.tensor(r), torch.tensor(q), torch.tensor(k))) for k in keys] for q in queries]
        for r in rows
    ]


def vmaps(traced):
    return [
        n for name in ("_add_batch_dim", "_remove_batch_dim", "_vmap_increment_nesting") for n in traced.called(name)
    ]


@examples(12)
@given(
    name=st.sampled_from(list(MASKS)),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)),
    heads=st.booleans(),
    dynamic=st.sampled_from([False, None, True]),
    seed=st.integers(0, 2**16),
)
def test_a_mask_is_what_it_was(name, sizes, heads, dynamic, seed):
    mask = MASKS[name]
    seen = torch.rand(sizes[0], sizes[2], generator=torch.Generator().manual_seed(seed)) < 0.6

    def function(seen, hidden):
        rows, queries, keys = (torch.arange(size) for size in hidden.shape)
        return by_vmap(mask, seen, *((rows, torch.arange(1), queries, keys) if heads else (rows, queries, keys)))

    traced = trace(function, seen, torch.zeros(sizes), dynamic=dynamic)
    assert canonicalize_vmap(traced.module.graph) == 1 and not vmaps(traced)
    traced.module.graph.lint()
    traced.module.recompile()
    expected = torch.tensor(by_loops(mask, seen, *map(range, sizes)))
    result = traced.run()
    assert torch.equal(result, expected[:, None] if heads else expected)
    (output,) = (node for node in traced.module.graph.nodes if node.op == "output")
    recorded = value_of(output.args[0][0])
    assert recorded.dim() == result.dim() and recorded.dtype == torch.bool
    assert canonicalize_vmap(traced.module.graph) == 0


def test_two_masks():
    def function(x):
        places = torch.arange(x.shape[0])
        return [by_vmap(MASKS[name], None, places, places, places) for name in ("causal", "window")]

    traced = trace(function, torch.zeros(5))
    before = traced.run()
    assert canonicalize_vmap(traced.module.graph) == 2 and not vmaps(traced)
    traced.module.recompile()
    assert all(map(torch.equal, traced.run(), before))


LEFT_ALONE = {
    "more than numbers": lambda x: torch.vmap(lambda row: row + 1)(x),
    "a sum": lambda x: torch.vmap(lambda row: row.sum())(x),
    "along another axis": lambda x: torch.vmap(lambda column: column * 2, in_dims=1)(x),
    "numbers of a tensor of its own": lambda x: torch.vmap(lambda row: torch.ops.aten.index(row, [torch.tensor(0)]))(x),
    "put behind": lambda x: torch.vmap(lambda a: torch.vmap(lambda b: a < b, out_dims=-1)(x[0]), out_dims=-1)(x[1]),
    "a function of two": lambda x: torch.vmap(lambda a: torch.atan2(a, a))(x[0]),
}


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_left_alone(kind):
    traced = trace(LEFT_ALONE[kind], torch.randn(3, 4))
    before = traced.code()
    assert vmaps(traced) and canonicalize_vmap(traced.module.graph) == 0 and traced.code() == before


# --- What every layer takes of a mask ---------------------------------------------------------------


def layers(x, mask, cuts, between=lambda mask, layer: None):
    """Attention again and again, each with what it takes of one mask."""
    for layer, cut in enumerate(cuts):
        x = x + F.scaled_dot_product_attention(x, x, x, attn_mask=mask[:, :, :, :cut])
        between(mask, layer)
    return x


def attended(function):
    """(parts taken before, parts taken now, the same result)"""
    traced = trace(function, torch.randn(2, 1, 5, 4), torch.randn(2, 1, 5, 8))
    inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in traced.inputs]
    before = traced.run()
    traced.inputs = tuple(inputs)
    merged = canonicalize_masks(traced.module.graph)
    traced.module.graph.lint()
    traced.module.recompile()
    torch.testing.assert_close(traced.run(), before, atol=0, rtol=0)
    return merged, traced


def test_it_is_taken_once():
    merged, traced = attended(lambda x, mask: layers(x, mask * 2, (5, 5, 5)))
    (part,) = {node.kwargs["attn_mask"] for node in traced.called("scaled_dot_product_attention")}
    assert merged == 2 and part.prev is part.args[0]


def test_other_parts_stay():
    def shifted(x, mask):
        second = F.scaled_dot_product_attention(x, x, x, attn_mask=mask[:, :, :, 1:6])
        return layers(x, mask, (5,)) + second

    assert attended(shifted)[0] == 0
    assert attended(lambda x, mask: layers(x, mask[:, :, :, :5], (5,)) + layers(x, mask + 1, (5,)))[0] == 0


def test_what_is_written_before_is_in_it():
    def written(x, mask):
        mask = mask.clone()
        mask[:, :, :, :2] = mask[:, :, :, :2] + 1
        return layers(x, mask, (5, 5))

    assert attended(written)[0] == 1


def test_what_is_written_between_keeps_them_apart():
    def written(x, mask):
        return layers(x, mask.clone(), (5, 5), lambda mask, layer: mask[:, :, :, :2].add_(1))

    assert attended(written)[0] == 0
