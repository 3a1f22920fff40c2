"""Which dimensions are one axis: every size below is 4 or so, and only the data tells axes apart."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from tracing import record, trace

from earlytom_compile.passes.axes import AxisMap, op_name
from earlytom_compile.passes.axis_algebra import AxisSpace, Dim, Size, finest_groups

N = 4

# What goes in -> what comes out, a letter an axis; all axes have size 4, "1" has 1, "_" is an axis of its own.
MEANINGS = {
    "ab -> ab": [
        lambda x: x * 2, lambda x: x.neg(), torch.relu, F.gelu, lambda x: x.clone().mul_(3), lambda x: x.softmax(0),
        lambda x: F.dropout(x, 0.5, False), lambda x: x.cumsum(1), lambda x: x.to(torch.float64), lambda x: x.flip(0),
        torch.zeros_like, lambda x: x.roll(1, 0), torch.tril, lambda x: x.masked_fill(x > 0, 0.0), lambda x: x[:],
        lambda x: x[..., :], lambda x: x[:4], lambda x: x[:, 0:9], lambda x: x.narrow(1, 0, 4), lambda x: x.view(4, 4),
        lambda x: x.reshape(-1, 4), lambda x: x.flatten().view(4, 4), lambda x: x.flatten().unflatten(0, (4, -1)),
        lambda x: x[None].expand(4, 4, 4)[0], lambda x: x.repeat(1, 1), lambda x: x.sort(0)[0], F.silu,
        lambda x: x.view(4, 2, 2).view(4, 4), lambda x: x.unsqueeze(1).squeeze(1), lambda x: torch.where(x > 0, x, 0.0),
        lambda x: F.layer_norm(x, (4,)), lambda x: F.normalize(x, dim=-1), lambda x: torch.clamp(x, 0, 1),
        lambda x: x.view(torch.int32), lambda x: x.contiguous().type_as(x), lambda x: x.view_as(x.exp()),
        lambda x: torch.cat([x, torch.tensor([])], 0), lambda x: x.expand_as(x), lambda x: x.reshape(2, 8).view(4, 4),
        lambda x: torch.stack([x, x]).unbind(0)[0], lambda x: x.masked_scatter(x > 0, x.flatten()),
        lambda x: x[torch.arange(4)], lambda x: x[torch.arange(4)[:, None], torch.arange(4)[None, :]],
        lambda x: x.gather(0, torch.arange(4)[:, None].expand(4, 4)), lambda x: F.pad(x, (0, 0)),
    ],
    "ab -> ba": [
        lambda x: x.t(), lambda x: x.T, lambda x: x.mT, lambda x: x.transpose(0, 1), lambda x: x.permute(1, 0),
        lambda x: x.permute((1, 0)), lambda x: x.movedim(0, 1), lambda x: torch.swapaxes(x, 0, 1),
    ],
    "ab -> a": [
        lambda x: x.sum(1), lambda x: x.mean(-1), lambda x: x.amax(dim=1), lambda x: x.max(1).values,
        lambda x: x.argmax(1), lambda x: x[:, 0], lambda x: x[:, -1], lambda x: x.select(1, 0), lambda x: x.std(1),
        lambda x: x.var(dim=1), lambda x: x.norm(dim=1), lambda x: x.logsumexp(1), lambda x: (x > 0).any(1),
        lambda x: x.unbind(1)[2], lambda x: torch.einsum("ab->a", x), lambda x: F.cosine_similarity(x, x),
        lambda x: torch.matmul(x, torch.ones(4)),
    ],
    "ab -> a1": [lambda x: x.sum(1, keepdim=True), lambda x: x[:, -1:], lambda x: x.mean((1,), True)],
    "ab -> a1b": [lambda x: x[:, None], lambda x: x.unsqueeze(1), lambda x: x.view(4, 1, 4), lambda x: x[:, None, :]],
    "ab -> _ab": [
        lambda x: x.expand(4, 4, 4), lambda x: x[None].repeat(4, 1, 1), lambda x: torch.stack([x, x, x, x]),
        lambda x: x.broadcast_to(4, 4, 4), lambda x: x.repeat(4, 1, 1),
    ],
    "ab -> a_": [
        lambda x: F.linear(x, torch.ones(4, 4)), lambda x: x @ torch.ones(4, 4), lambda x: x[:, :2].repeat(1, 2),
        lambda x: F.one_hot(x.argmax(1), 4), lambda x: x.topk(4, 1)[0], lambda x: x.chunk(2, 1)[0].repeat(1, 2),
        lambda x: F.pad(x, (1, 1))[:, 1:5], lambda x: F.embedding(x.argmax(1), torch.ones(9, 4)),
        lambda x: x.split(2, 1)[1].repeat_interleave(2, 1),
    ],
    "ab, ab -> ab": [
        torch.add, lambda x, y: x + y, lambda x, y: x.clone().add_(y), torch.maximum, lambda x, y: x.copysign(y),
        lambda x, y: torch.lerp(x, y, 0.5), lambda x, y: x.masked_fill(y > 0, 1.0), lambda x, y: (x > y) & (y > x),
        lambda x, y: x.clone().copy_(y), lambda x, y: torch.broadcast_tensors(x, y)[0],
    ],
    "ab, b -> ab": [
        lambda x, y: x * y, lambda x, y: F.layer_norm(x, (4,), y, y), lambda x, y: F.rms_norm(x, (4,), y),
        lambda x, y: x[:, None] .mul(y)[:, 0],
    ],
    "ab, bc -> ac": [
        torch.matmul, torch.mm, lambda x, y: x @ y, lambda x, y: F.linear(x, y.t()),
        lambda x, y: torch.einsum("ij,jk->ik", x, y), lambda x, y: torch.bmm(x[None], y[None])[0],
    ],
    "ab, cb -> ac": [F.linear, lambda x, y: torch.einsum("ab,cb->ac", x, y), lambda x, y: x @ y.mT],
    "a, b -> ab": [torch.outer, lambda x, y: x[:, None] * y, lambda x, y: torch.einsum("a,b->ab", x, y)],
    "abcd -> abcd": [
        lambda x: x.flatten(1, 2).unflatten(1, (4, 4)), lambda x: x.reshape(16, 16).view(4, 4, 4, 4),
        lambda x: x.reshape(4, 64).view(16, 16).view(4, 4, 4, 4), lambda x: x.permute(0, 2, 1, 3).transpose(1, 2),
    ],
    "abcd -> ab__": [lambda x: F.avg_pool2d(x, 3, 1, 1), lambda x: F.interpolate(x, size=(4, 4))],
    "abcd, ebfg -> ae__": [lambda x, w: F.conv2d(x, w, padding=2)[:, :, :4, :4]],
    "abcd, abed, abef -> abcf": [F.scaled_dot_product_attention],
    "abcd, abed, abef, ce -> abcf": [
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
        lambda q, k, v, m: (q @ k.transpose(2, 3) + m).softmax(-1) @ v,
    ],
}  # fmt: skip

CASES = [(spec, i) for spec, functions in MEANINGS.items() for i in range(len(functions))]


@pytest.mark.parametrize(("spec", "which"), CASES)
def test_what_an_op_means(spec, which):
    terms, _, result = spec.partition(" -> ")
    inputs = [torch.randn([N] * len(term)) for term in terms.split(", ")]
    traced = record(MEANINGS[spec][which], *inputs)
    axes = AxisMap.infer(traced.module)
    assert not [obstacle for obstacle in axes.obstacles if "no axis rule" in obstacle.why]
    output = next(iter(reversed(traced.module.graph.nodes))).args[0][0]
    places = {
        letter: (traced.node(f"x{k}"), i) for k, term in enumerate(terms.split(", ")) for i, letter in enumerate(term)
    }
    assert len(result) == len(axes.values[output].dims)
    for i, letter in enumerate(result):
        for known, place in places.items():
            if letter != "1":
                assert axes.same((output, i), place) == (letter == known), f"{letter} at {i} and {known}"


def test_letters_that_stay_apart_in_the_inputs():
    """The cases above would hold if everything were one axis; most pairs are not."""
    traced = record(lambda x, y: x @ y, torch.ones(4, 4), torch.ones(4, 4))
    axes = AxisMap.infer(traced.module)
    (x, y) = traced.node("x0"), traced.node("x1")
    assert axes.same((x, 1), (y, 0))
    assert not axes.same((x, 0), (x, 1)) and not axes.same((y, 0), (y, 1)) and not axes.same((x, 0), (y, 1))


@pytest.mark.parametrize("dynamic", [False, True])
def test_products_are_taken_apart_as_they_were_made(dynamic):
    """Two videos of two frames of two by two patches, all flattened and regrouped."""

    def regroup(x):
        videos, frames, patches, width = x.shape
        rows = x.reshape(videos * frames, patches, width)
        return rows.reshape(videos, frames * patches, width).view(videos, frames, patches, width).cos()

    traced = trace(regroup, torch.ones(2, 2, 2, 2), dynamic=dynamic)
    axes = AxisMap.infer(traced.module)
    x, cos = traced.node("x"), traced.called("cos")[0]
    assert [[axes.same((x, i), (cos, j)) for j in range(4)] for i in range(4)] == torch.eye(4).bool().tolist()


def test_members_are_all_dimensions_of_an_axis_in_graph_order():
    def causal(x):
        order = torch.arange(x.shape[0])
        allowed = order[:, None] >= order[None, :]
        return (x @ x.T).masked_fill(~allowed, 0.0) @ x

    traced = trace(causal, torch.ones(4, 4), dynamic=False)
    members = AxisMap.infer(traced.module).members(traced.node("x"), 0)
    names = [node.name for node, _ in members]
    assert names[0] == "l_x_" and sum(node.target is torch.arange for node, _ in members) == 1
    assert (traced.node("x"), 1) not in members
    assert [place for place in members if place[0].name == "invert"][0][1] == 0
    assert len([place for place in members if place[0].name == "invert"]) == 2


def test_a_mask_is_linked_by_the_positions_that_index_it():
    def linked(mask, x):
        rows, columns = torch.arange(mask.shape[0])[:, None], torch.arange(x.shape[1])[None, :]
        return mask[rows, columns] + x

    traced = trace(linked, torch.ones(4, 4), torch.ones(4, 4), dynamic=False)
    axes = AxisMap.infer(traced.module)
    mask, x = traced.node("mask"), traced.node("x")
    assert axes.same((mask, 0), (x, 0)) and axes.same((mask, 1), (x, 1)) and not axes.same((mask, 0), (x, 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p + 1,
        lambda p: p * 1 - 0,
        lambda p: torch.arange(1, 5),
        lambda p: p.clone().add_(1) - 1,
        lambda p: 3 - p,
    ],
)
def test_changed_positions_are_no_positions(change):
    traced = trace(lambda x: x[change(torch.arange(x.shape[0])) % 4], torch.ones(4, 4), dynamic=False)
    axes = AxisMap.infer(traced.module)
    assert any("unknown axis" in obstacle.why for obstacle in axes.obstacles)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.register_buffer("table", torch.ones(4))

    def forward(self, x):
        return x @ self.weight + self.table


def test_weights_and_inputs_have_fixed_sizes():
    traced = trace(Mixed(), torch.ones(4, 4))
    axes = AxisMap.infer(traced.module)
    reasons = {node.name: axes.dim(node, 0).fixed for node in traced.module.graph.nodes if node.op == "placeholder"}
    assert sum("weight" in reason for reason in reasons.values()) == 2, reasons
    assert sum("graph input" in reason for reason in reasons.values()) == 1


def test_unknown_ops_end_the_inference_and_are_remembered():
    traced = record(lambda x: torch.special.i0e(torch.linalg.svd(x)[0]) + x, torch.ones(4, 4))
    axes = AxisMap.infer(traced.module)
    whys = [obstacle.why for obstacle in axes.obstacles]
    assert sum("no axis rule" in why for why in whys) == 2


def test_inference_installs_no_guards():
    def regroup(x):
        return x.reshape(-1, x.shape[2]).view(x.shape) + torch.zeros(x.shape[0], 1, x.shape[2])

    traced = trace(regroup, torch.ones(4, 6, 8), dynamic=True)
    shape_env = traced.node("x").meta["example_value"].fake_mode.shape_env
    before = len(shape_env.guards)
    AxisMap.infer(traced.module)
    assert len(shape_env.guards) == before


@pytest.mark.parametrize(
    "spelling",
    [
        lambda x: x + 1,
        lambda x: x.add(1),
        lambda x: torch.add(x, 1),
        lambda x: x.add_(1),
        lambda x: torch.ops.aten.add.Tensor(x, 1),
        lambda x: x.__add__(1),
        lambda x: 1 + x,
    ],
)
def test_one_name_for_all_spellings(spelling):
    traced = trace(spelling, torch.ones(4))
    assert [op_name(n) for n in traced.module.graph.nodes if n.op.startswith("call")][0] in ("add", "radd")


@given(st.lists(st.integers(2, 5), max_size=4), st.lists(st.lists(st.integers(2, 3), max_size=2), max_size=5))
def test_groups_are_the_finest(free, pieces):
    """Group by group both sides multiply to the same, and no group can be cut further."""
    sizes = [*free, *(math.prod(piece) for piece in pieces if piece)]
    regrouped = [*free, *(n for piece in pieces for n in piece)]
    left, right = ([Size.of(n) for n in side] for side in (sizes, regrouped))
    groups = finest_groups("product", left, right)
    for a, b in groups:
        ins, outs = sizes[a], regrouped[b]
        assert math.prod(ins) == math.prod(outs)
        cuts = {math.prod(ins[:i]) for i in range(1, len(ins))} & {math.prod(outs[:i]) for i in range(1, len(outs))}
        assert not cuts
    assert [n for a, _ in groups for n in sizes[a]] == sizes
    assert [n for _, b in groups for n in regrouped[b]] == regrouped


def test_axes_written_in_two_ways_are_aligned():
    """24 = 4 x 6 = 4' x 2 x 3: 4' is 4, and 6 is 2 x 3."""
    space = AxisSpace()
    whole, four, six, again, two, three = (Dim(Size.of(n)) for n in (24, 4, 6, 4, 2, 3))
    space.relate("product", whole, (four, six))
    space.relate("product", whole, (again, two, three))
    space.align()
    assert four.root is again.root
    assert any(r.whole.root is six.root and r.parts == (two, three) for r in space.relations)
