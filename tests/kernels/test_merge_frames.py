import numpy as np
import plain_python
import pytest
import rounding
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import DTYPES, laid_out, layouts, native_dtypes, operator_settings, ops, plan_rows, seeds
from rounding import assert_within


@st.composite
def merge_plans(draw):
    """source, weight, n over up to 12 frames: rows in order, a few of them pairs."""
    frames = draw(st.integers(1, 12))
    rows, t = [], 0
    while t < frames:
        if t + 1 < frames and draw(st.booleans()):
            share = draw(st.integers(0, 8)) / 8
            rows.append((t, t + 1, share, 1 - share))
            t += 2
        else:
            rows.append((t, t, 1.0, 0.0))
            t += 1
    padded = rows + [(0, 0, 0.0, 0.0)] * (frames - len(rows))
    table = torch.tensor(padded)
    return table[:, :2].long(), table[:, 2:].clone(), len(rows)


@operator_settings
@given(
    seed=seeds,
    plan=merge_plans(),
    rest=st.lists(st.integers(1, 4), max_size=3),
    dtype=native_dtypes,
    layout=layouts,
)
def test_is_the_weighted_sum_of_the_sources(seed, plan, rest, dtype, layout):
    source, weight, n = plan
    x = torch.randn(len(source), *rest, generator=torch.Generator().manual_seed(seed)).to(dtype)
    (actual,) = ops.merge_frames([laid_out(x, layout)], source, weight, n)
    rows = plan_rows(source[:n], weight[:n], 0)
    expected = torch.from_numpy(np.asarray(plain_python.merge(x.double().numpy(), rows)))
    assert actual.dtype == dtype and actual.shape == (n, *rest) and actual.is_contiguous()
    assert_within(actual, expected, rounding.merge_frames(x, source, weight, n))


@operator_settings
@given(
    seed=seeds,
    plan=merge_plans(),
    riders=st.lists(
        st.tuples(st.lists(st.integers(0, 4), max_size=3), native_dtypes, layouts),
        min_size=2,
        max_size=4,
    ),
)
def test_what_rides_along_merges_as_it_would_alone(seed, plan, riders):
    generator = torch.Generator().manual_seed(seed)
    source, weight, n = plan
    tensors = [
        laid_out(torch.randn(len(source), *rest, generator=generator).to(dtype), layout)
        for rest, dtype, layout in riders
    ]
    together = ops.merge_frames(tensors, source, weight, n)
    for merged, x in zip(together, tensors, strict=True):
        (alone,) = ops.merge_frames([x], source, weight, n)
        assert merged.dtype == x.dtype and merged.is_contiguous() and torch.equal(merged, alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_untouched_frames_are_exact_copies_whatever_they_hold(dtype):
    x = torch.randn(4, 5).to(dtype)
    x[0, 0], x[0, 1], x[0, 2] = float("inf"), float("nan"), -0.0
    source, weight = (
        torch.tensor([[0, 0], [1, 2], [3, 3], [0, 0]]),
        torch.tensor([[1, 0], [0.5, 0.5], [1, 0], [0, 0.0]]),
    )
    (out,) = ops.merge_frames([x], source, weight, 3)
    bits = {2: torch.int16, 4: torch.int32}[x.element_size()]
    assert torch.equal(out[[0, 2]].view(bits), x[[0, 3]].view(bits))
    assert out.data_ptr() != x.data_ptr()


def test_a_frame_of_weight_zero_cannot_leak_in():
    x = torch.tensor([[1.0], [float("inf")]])
    source, weight = torch.tensor([[0, 1], [0, 0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert ops.merge_frames([x], source, weight, 1)[0].tolist() == [[1.0]]


def test_halves_are_blended_in_float32():
    x = torch.tensor([[60000.0], [60000.0]], dtype=torch.float16)
    source, weight = torch.tensor([[0, 1], [0, 0]]), torch.tensor([[1.5, -0.5], [0, 0]])
    assert ops.merge_frames([x], source, weight, 1)[0].tolist() == [[60000.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_not_rounded_to_the_dtype_of_the_frames(dtype):
    x = torch.tensor([[70.0], [-30.0]], dtype=dtype)
    source, weight = torch.tensor([[0, 1], [0, 0]]), torch.tensor([[0.3, 0.7], [0.0, 0.0]])
    assert_within(ops.merge_frames([x], source, weight, 1)[0], 0.0 * x[:1], rounding.merge_frames(x, source, weight, 1))


def plan(**changes):
    parts = {
        "tensors": [torch.ones(3, 2)],
        "source": torch.tensor([[0, 0], [1, 2], [0, 0]]),
        "weight": torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]]),
        "n": 2,
    } | changes
    return parts["tensors"], parts["source"], parts["weight"], parts["n"]


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"n": 3}, r"n=3, but the rows .* are \[0, 1\]"),
        ({"n": 1}, r"n=1, but the rows .* are \[0, 1\]"),
        ({"n": 0}, r"n=0, but the rows .* are \[0, 1\]"),
        ({"weight": torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.5, 0.5]])}, r"rows .* are \[0, 2\]"),
        ({"tensors": [torch.ones(4, 2)]}, "over 3 frames cannot merge a tensor with 4"),
        ({"tensors": [torch.ones(3, 2), torch.ones(2)]}, "over 3 frames cannot merge a tensor with 2"),
        ({"tensors": [torch.ones(3, 2), torch.tensor(1.0)]}, "float32 with 0 axes"),
        ({"tensors": []}, "no tensors"),
        ({"tensors": [torch.ones(3, 2, dtype=torch.int64)]}, "int64"),
        ({"source": torch.tensor([[0, 0], [1, 3], [0, 0]])}, r"source \(1, 3\)"),
        ({"source": torch.tensor([[0, 0], [-1, 1], [0, 0]])}, r"source \(-1, 1\)"),
        ({"source": torch.zeros(3, 2)}, "float32 with 2 axes"),
        ({"weight": torch.tensor([[1.0, 0.0], [float("nan"), 0.5], [0.0, 0.0]])}, "weights? .*finite"),
    ],
)
def test_refuses_what_means_nothing(changes, says):
    with pytest.raises(ValueError, match=f"merge_frames.*{says}"):
        ops.merge_frames(*plan(**changes))
