"""Where an axis cannot be followed for sure, the graph stays as it was and the reason names what is in the way."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from tracing import Traced, shrink, trace

from earlytom_compile.passes.graph_order import stable_topological_sort
from earlytom_compile.passes.reasons import NotApplicable
from earlytom_compile.passes.retarget_axes import ResizedAxis, retarget_axes


def refused(function, *inputs, dynamic=False, axes=None) -> str:
    """The reason not to follow a cut of the first axis of the first input, from 4 to 3."""
    traced = trace(function, *inputs, dynamic=dynamic)
    resized = axes(traced) if axes else [shrink(traced, traced.node("x"), 0, 3, "frames")]
    before = traced.code()
    with pytest.raises(NotApplicable) as caught:
        retarget_axes(traced.module, resized)
    assert traced.code() == before, "the graph was changed although nothing could be done"
    assert caught.value.cure and str(caught.value) == f"{caught.value.reason}. {caught.value.cure}."
    return caught.value.reason


@torch.library.custom_op("axes_test::mystery", mutates_args=())
def mystery(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@mystery.register_fake
def _(x):
    return torch.empty_like(x)


X, Y = torch.randn(4, 4), torch.randn(4, 4)


def test_unknown_op():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleList([Mystery()])

        def forward(self, x):
            return self.inner[0](x) + 1

    class Mystery(nn.Module):
        def forward(self, x):
            return torch.ops.axes_test.mystery(x * 2)

    reason = refused(Model(), X)
    assert "'frames'" in reason and "axes_test::mystery" in reason and "inner" in reason


def test_unknown_op_that_makes_a_partner():
    reason = refused(lambda x, y: x + torch.ops.axes_test.mystery(y), X, Y)
    assert "a result of axes_test::mystery" in reason and "fixed size of 4" in reason


def test_unknown_op_elsewhere_does_not_matter():
    traced = trace(lambda x, y: (x.view(4, 2, 2), torch.ops.axes_test.mystery(y)), X, Y)
    axis = shrink(traced, traced.node("x"), 0, 3)
    assert retarget_axes(traced.module, [axis]) == 1
    assert_close(traced.run()[0], X[:3].view(3, 2, 2))


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.per_frame = nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        return x + self.per_frame


def test_fixed_size_of_a_weight():
    reason = refused(Positions(), X)
    assert "per_frame" in reason and "the weight" in reason and "fixed size of 4" in reason


def test_graph_input_left_behind():
    reason = refused(lambda x, y: x + y, X, Y)
    assert "the graph input" in reason and "y" in reason


@pytest.mark.parametrize("sizes", [(3, 3), (3, 2)])
def test_two_axes_may_only_meet_with_one_size(sizes):
    def both(traced: Traced) -> list[ResizedAxis]:
        return [shrink(traced, traced.node(name), 0, to, name) for name, to in zip("xy", sizes, strict=True)]

    if sizes[0] == sizes[1]:
        traced = trace(lambda x, y: (x + y).view(4, 2, 2), X, Y)
        retarget_axes(traced.module, both(traced))
        assert_close(traced.run(), (X + Y)[:3].view(3, 2, 2))
    else:
        reason = refused(lambda x, y: x + y, X, Y, axes=both)
        assert re.search(r"'x' and 'y' meet .* 3 and 2", reason)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x.view(2, 2, 4), "written as 2 x 2"),
        (lambda x: x.flatten().view(8, 2), "written as 8 x 2"),
        (lambda x: x[:2], "cut to its first positions"),
        (lambda x: x[1:], "cut into parts"),
        (lambda x: x[::2], "cut into parts"),
        (lambda x: x[-4:], "cut into parts"),
        (lambda x: x.narrow(0, 1, 2), "cut into parts"),
        (lambda x: x[2], "read at one position"),
        (lambda x: x.select(0, 1), "read at one position"),
        (lambda x: x.chunk(2)[0], "taken apart"),
        (lambda x: x.split([1, 3])[0], "taken apart"),
        (lambda x: x.unbind()[0], "taken apart"),
        (lambda x: x[torch.tensor([0, 1])], "positions on an unknown axis"),
        (lambda x: x.gather(0, x.long() * 0), "positions on an unknown axis"),
        (lambda x: x[torch.arange(4) - 1], "positions on an unknown axis"),
        (lambda x: F.avg_pool2d(x[None], 2, 2), "resampled"),
        (lambda x: F.group_norm(x.T, 2), "normalised in groups"),
        (lambda x: torch.zeros(4, 2) @ torch.ones(2, 2) + x.sum(), "nothing in the graph says"),
        (lambda x: x.sum() + torch.arange(4), "nothing in the graph says"),
        (lambda x: x.sum(0) / x.shape[0], "divides by 4"),
        (lambda x: x + torch.arange(2, 6)[:, None], "fixed size"),
        (lambda x: x + torch.tensor([[1.0], [2.0], [3.0], [4.0]]), "fixed size"),
    ],
)
def test_ops_in_the_way(function, words):
    assert words in refused(function, X)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[-1:], lambda x: x[-2:], lambda x: x[0], lambda x: x[-1], lambda x: x[:], lambda x: x[:4],
        lambda x: x[0:9], lambda x: x.sum(0), lambda x: x.mean(0) + x.max(0).values, lambda x: x.flip(0),
        lambda x: x[:, 1:] + 1, lambda x: x[x > 0], lambda x: x.T @ x, lambda x: x.argmax(0),
        lambda x: x.mT.mH + 1, lambda x: x.H.T + x.data,
        lambda x: x.view(len(x), 2, 2), lambda x: x + torch.arange(0, 8, 2) / 4,
    ],
)  # fmt: skip
def test_ops_not_in_the_way(function):
    traced = trace(function, X)
    retarget_axes(traced.module, [shrink(traced, traced.node("x"), 0, 3)])
    assert_close(traced.run(), function(X[:3]))


def test_size_used_as_a_number():
    x = torch.randn(6, 4)
    reason = refused(lambda x: x.sum(0) * x.shape[0], x, dynamic=True)
    assert "computes with the number" in reason


def test_a_size_that_somebody_knows_to_be_the_old_one():
    def function(x):
        return x.sum(0) * x.shape[0], x.sum(0) - x.shape[0]

    x = torch.randn(6, 4)
    traced = trace(function, x, dynamic=True)
    (times,), (less,) = traced.called("mul"), traced.called("sub")
    axis = shrink(traced, traced.node("x"), 0, 3)
    with pytest.raises(NotApplicable, match="computes with the number"):
        retarget_axes(traced.module, [axis], as_before={times})
    retarget_axes(traced.module, [axis], as_before={times, less})
    assert_close(traced.run(), (x[:3].sum(0) * 6, x[:3].sum(0) - 6))
    reason = refused(lambda x: (x + 1, x.shape[0] * 2), x, dynamic=True)
    assert "output" in reason


def test_axis_of_size_one():
    def one(traced: Traced) -> list[ResizedAxis]:
        return [shrink(traced, traced.node("x"), 0, 1, "frames", as_node=True)]

    assert "size 1" in refused(lambda x: x + 1, torch.randn(1, 4), axes=one)


def test_an_axis_that_keeps_its_size_may_not_meet_one_that_changes():
    def both(traced: Traced) -> list[ResizedAxis]:
        return [shrink(traced, traced.node("x"), 0, 3, "frames"), shrink(traced, traced.node("y"), 0, 4, "others")]

    assert "'others'" in refused(lambda x, y: x + y, X, Y, axes=both)


def test_dead_code_does_not_matter():
    def checked(x, y):
        x.view(2, 2, 4).sum() + torch.ops.axes_test.mystery(x).sum()
        return x * 2

    traced = trace(checked, X, Y)
    assert traced.called("view")
    retarget_axes(traced.module, [shrink(traced, traced.node("x"), 0, 3)])
    assert not traced.called("view")
    assert_close(traced.run(), X[:3] * 2)


def test_nothing_to_do():
    traced = trace(lambda x: x.view(4, 2, 2), X)
    before = traced.code()
    assert retarget_axes(traced.module, []) == 0
    assert retarget_axes(traced.module, [ResizedAxis(traced.node("x"), 0, "frames", 4)]) == 0
    assert traced.code() == before


def test_missing_shape_is_an_error_of_the_caller():
    traced = trace(lambda x: x.view(4, 2, 2), X)
    axis = shrink(traced, traced.node("x"), 0, 3)
    del axis.node.meta["example_value"]
    with pytest.raises(ValueError, match="example_value"):
        retarget_axes(traced.module, [axis])


# Order


def late(x, y):
    return x + torch.arange(x.shape[0])[:, None], y.cos()


def _size_after_everything(traced: Traced) -> list[ResizedAxis]:
    """The new size is computed from the cosine of the other input, which comes last in the graph."""
    graph = traced.module.graph
    with graph.inserting_after(traced.called("cos")[0]):
        size = graph.call_function(torch.ops.aten.sym_size.int, (traced.called("cos")[0], 0))
    axis = shrink(traced, traced.node("x"), 0, 4, "frames")
    axis.node.args = (*axis.node.args[:3], size)
    return [ResizedAxis(axis.node, 0, "frames", size)]


def test_graph_is_sorted_where_a_size_comes_late():
    traced = trace(late, X, torch.randn(3, 2))
    retarget_axes(traced.module, _size_after_everything(traced))
    order = [n.name for n in traced.module.graph.nodes]
    assert order.index("cos") < order.index("arange")
    assert_close(traced.run()[0], X[:3] + torch.arange(3)[:, None])


def test_size_that_depends_on_itself():
    def circular(traced: Traced) -> list[ResizedAxis]:
        resized = shrink(traced, traced.node("x"), 0, 3, "frames")
        with traced.module.graph.inserting_after(traced.called("cos")[0]):
            size = traced.module.graph.call_function(torch.ops.aten.sym_size.int, (traced.called("cos")[0], 0))
        return [ResizedAxis(resized.node, 0, "frames", size)]

    reason = refused(lambda x: x + torch.arange(4).cos()[:, None], X, axes=circular)
    assert "only known after it" in reason


def test_a_write_in_place_is_not_overtaken():
    def writing(x, y):
        y = y * 1
        positions = torch.arange(x.shape[0])[:, None] + y[0, 0]
        y.mul_(2)
        return x + positions, y.cos()

    traced = trace(writing, X, torch.randn(3, 2))
    before = traced.code()
    with pytest.raises(NotApplicable, match="without writing in place"):
        retarget_axes(traced.module, _size_after_everything(traced))
    assert traced.called("arange")[0].args == (4,) and before.count("arange") == traced.code().count("arange")


def test_sorting_keeps_what_is_in_order():
    traced = trace(late, X, Y)
    before = traced.code()
    stable_topological_sort(traced.module.graph)
    assert traced.code() == before
