"""Random programs over a few axes of colliding sizes: the rewritten graph computes what the program computes.

A program reads every size it needs from its input, as models do. It is recorded on an input with ``a`` frames,
then rewritten for fewer; running it on fewer frames says what must come out.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from effort import examples
from hypothesis import given, note, reject
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from tracing import Traced, record, shrink, trace

from earlytom_compile.passes.axes import AxisMap
from earlytom_compile.passes.reasons import NotApplicable
from earlytom_compile.passes.retarget_axes import ResizedAxis, retarget_axes

SIZES = st.sampled_from([2, 3, 4, 6])


@dataclass
class State:
    """A tensor and what its axes are made of: names whose sizes multiply, row-major."""

    x: Tensor
    labels: list[tuple[str, ...]]
    sizes: dict[str, int]
    constants: int = field(default=0)

    def size(self, label: tuple[str, ...]) -> int:
        total = 1
        for name in label:
            total *= self.sizes[name]
        return total

    def shape(self, labels: list[tuple[str, ...]]) -> list[int]:
        return [self.size(label) for label in labels]

    def named(self, size: int) -> str:
        self.constants += 1
        name = f"c{self.constants}"
        self.sizes[name] = size
        return name


Step = Callable[[State], None]


def regroup(cuts: list[bool], infer: int) -> Step:
    """Reshape to other groups of the same names; an empty group is an axis of size 1."""

    def step(s: State) -> None:
        names = [name for label in s.labels for name in label]
        groups: list[tuple[str, ...]] = [()]
        for i, name in enumerate(names):
            if i and cuts[i % len(cuts)]:
                groups.append(())
            groups[-1] += (name,)
        if cuts[-1]:
            groups.insert(len(groups) // 2, ())
        shape = s.shape(groups)
        if infer < len(shape):
            shape[infer] = -1
        s.x, s.labels = s.x.reshape(shape), groups

    return step


def permute(order: list[int]) -> Step:
    def step(s: State) -> None:
        rank = len(s.labels)
        dims = sorted(range(rank), key=lambda i: (order[i % len(order)], i))
        s.x, s.labels = s.x.permute(*dims), [s.labels[i] for i in dims]

    return step


def expand(count: int, copy: bool) -> Step:
    def step(s: State) -> None:
        name = s.named(count)
        shape = s.shape(s.labels)
        s.x = s.x.unsqueeze(0).repeat(count, *[1] * len(shape)) if copy else s.x.expand(count, *shape)
        s.labels = [(name,), *s.labels]

    return step


def add_positions(at: int) -> Step:
    def step(s: State) -> None:
        i = at % len(s.labels)
        positions = torch.arange(s.size(s.labels[i])).float()
        s.x = s.x + positions.reshape(-1, *[1] * (len(s.labels) - 1 - i))

    return step


def add_table(fill: float) -> Step:
    def step(s: State) -> None:
        s.x = s.x + torch.full(s.shape(s.labels), fill)

    return step


def mix_causally(at: int) -> Step:
    """An [n, n] lower triangle of two aranges times the axis, with the residual that tells what its rows are."""

    def step(s: State) -> None:
        i = at % len(s.labels)
        n = s.size(s.labels[i])
        triangle = (torch.arange(n)[:, None] >= torch.arange(n)[None, :]).float()
        x = s.x.transpose(i, -1).unsqueeze(-1)
        s.x = s.x + torch.matmul(triangle, x).squeeze(-1).transpose(i, -1)

    return step


def attend(at: int) -> Step:
    """Every position of one axis attends to all, over the last axis; a mask is indexed by positions."""

    def step(s: State) -> None:
        i = at % len(s.labels)
        n = s.size(s.labels[i])
        mask = torch.ones(1, n, dtype=torch.bool)
        allowed = mask[torch.arange(1)[:, None], torch.arange(n)[None, :]]
        x = s.x.transpose(i, 0).reshape(1, n, -1)
        y = F.scaled_dot_product_attention(x, x, x, attn_mask=allowed[:, None].expand(1, n, n))
        rest = [s.labels[0] if k == i else label for k, label in enumerate(s.labels) if k]
        order = s.shape([s.labels[i], *rest]) if i else s.shape(s.labels)
        s.x = y.reshape(order).transpose(i, 0)

    return step


def append_rows(at: int, count: int) -> Step:
    def step(s: State) -> None:
        i = at % len(s.labels)
        shape = s.shape(s.labels)
        shape[i] = count
        s.x = torch.cat([s.x, torch.ones(shape)], dim=i)
        s.labels[i] = (s.named(s.x.shape[i]),)

    return step


def take_all(at: int, how: int) -> Step:
    """Ways of writing the whole axis."""

    def step(s: State) -> None:
        i = at % len(s.labels)
        n = s.size(s.labels[i])
        if how == 0:
            s.x = s.x[(slice(None),) * i + (slice(0, n),)]
        elif how == 1:
            s.x = s.x.narrow(i, 0, n)
        elif how == 2:
            s.x = s.x.index_select(i, torch.arange(n))
        else:
            s.x = s.x.flip(i)

    return step


def keep_last(at: int) -> Step:
    def step(s: State) -> None:
        i = at % len(s.labels)
        s.x = s.x[(slice(None),) * i + (slice(-1, None),)]
        s.labels[i] = ()

    return step


def pool(at: int, keep: bool) -> Step:
    def step(s: State) -> None:
        i = at % len(s.labels)
        s.x = s.x.mean(i, keepdim=keep)
        s.labels = [*s.labels[:i], *([()] if keep else []), *s.labels[i + 1 :]]
        if not s.labels:
            s.x, s.labels = s.x.reshape(1), [()]

    return step


def project(count: int) -> Step:
    """A matrix made on the spot, so that its size follows whatever the last axis is."""

    def step(s: State) -> None:
        n = s.size(s.labels[-1])
        weight = torch.arange(count * n).reshape(count, n).float().sin()
        s.x = F.linear(s.x, weight)
        s.labels[-1] = (s.named(count),)

    return step


def normalise(kind: int) -> Step:
    def step(s: State) -> None:
        if kind == 0:
            s.x = s.x.softmax(-1)
        elif kind == 1:
            s.x = F.layer_norm(s.x, (s.size(s.labels[-1]),))
        else:
            s.x = s.x.cumsum(0)

    return step


PLACES = st.integers(0, 4)
STEPS = st.one_of(
    st.builds(regroup, st.lists(st.booleans(), min_size=2, max_size=5), st.integers(0, 5)),
    st.builds(permute, st.lists(PLACES, min_size=2, max_size=4)),
    st.builds(expand, st.sampled_from([5, 7]), st.booleans()),
    st.builds(add_positions, PLACES),
    st.builds(add_table, st.just(0.5)),
    st.builds(mix_causally, PLACES),
    st.builds(attend, PLACES),
    st.builds(append_rows, PLACES, st.integers(1, 2)),
    st.builds(take_all, PLACES, st.integers(0, 3)),
    st.builds(keep_last, PLACES),
    st.builds(pool, PLACES, st.booleans()),
    st.builds(project, st.sampled_from([5, 7])),
    st.builds(normalise, st.integers(0, 2)),
)


def program(steps: list[Step]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        a, b, c = x.shape
        state = State(x + 0.25, [("a",), ("b",), ("c",)], {"a": a, "b": b, "c": c})
        for step in steps:
            step(state)
        return state.x * 2

    return run


@given(st.lists(STEPS, min_size=1, max_size=9), SIZES, SIZES, SIZES, st.booleans(), st.booleans(), st.data())
@examples(150)
def test_programs_follow(steps, a, b, c, as_node, both, data):
    x = torch.randn(a, b, c, generator=torch.Generator().manual_seed(0))
    run = program(steps)
    traced = record(run, x)
    assert not [o for o in AxisMap.infer(traced.module).obstacles if "no axis rule" in o.why]
    check(traced, run, x, data, as_node, both)


@given(st.lists(STEPS, min_size=2, max_size=6), SIZES, SIZES, st.data())
@examples(6)
def test_programs_follow_in_dynamic_graphs(steps, a, b, data):
    x = torch.randn(a, b, a, generator=torch.Generator().manual_seed(0))
    run = program(steps)
    for dim in range(3):  # dynamic=True would make symbols of the numbers in the program, too
        torch._dynamo.maybe_mark_dynamic(x, dim)
    check(trace(run, x), run, x, data, as_node=data.draw(st.booleans()), both=False)


def check(traced: Traced, run: Callable[[Tensor], Tensor], x: Tensor, data, as_node: bool, both: bool) -> None:
    """Cuts the first axis (or the first two) behind the first op, and compares with a run on a smaller input."""
    note(traced.code())
    to = [data.draw(st.integers(min(2, n), n)) for n in x.shape[: 1 + both]]
    axes = [shrink(traced, traced.called("add")[0], 0, to[0], "a", as_node)]
    if both:
        axes.append(shrink(traced, axes[0].node, 1, to[1], "b"))
        axes[0] = ResizedAxis(axes[1].node, 0, "a", axes[0].size)
    try:
        retarget_axes(traced.module, axes)
    except NotApplicable as refusal:
        assert "nothing in the graph says" in refusal.reason
        reject()  # an expanded axis happens to be as large; hypothesis fails if this is the rule
    note(traced.code())
    expected = run(x[: to[0], : to[1]] if both else x[: to[0]])
    assert_close(traced.run(), expected, rtol=1e-4, atol=1e-4)
