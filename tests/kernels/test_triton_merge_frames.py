"""The Triton provider of merge_frames: against the native body, bit for bit where it copies, and ptxas."""

import pytest
import rounding
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import DEVICE, DTYPES, RUNS, dtypes, laid_out, layouts, ops, seeds
from rounding import assert_within
from test_merge_frames import merge_plans

triton = pytest.importorskip("triton")
import hopper  # noqa: E402

from earlytom_compile.kernels import triton_merge_frames  # noqa: E402
from earlytom_compile.kernels.providers import provider_of  # noqa: E402

pytestmark = pytest.mark.gpu

BITS = {2: torch.int16, 4: torch.int32}


def merged_together(tensors, source, weight, n):
    moved = [x.to(DEVICE) for x in tensors]
    return [x.cpu() for x in triton_merge_frames.run(moved, source.to(DEVICE), weight.to(DEVICE), n)]


def merged(x, source, weight, n):
    return merged_together([x], source, weight, n)[0]


def native(x, source, weight, n):
    return ops.merge_frames([x], source, weight, n)[0]


@examples(12)
@given(
    seed=seeds,
    plan=merge_plans(),
    rest=st.sampled_from([(), (1,), (7,), (3, 5), (729,), (4, 2, 3), (33, 130)]),
    dtype=dtypes,
    layout=layouts,
)
def test_is_the_native_operator(seed, plan, rest, dtype, layout):
    source, weight, n = plan
    x = torch.randn(len(source), *rest, generator=torch.Generator().manual_seed(seed)).to(dtype)
    moved = laid_out(x.to(DEVICE), layout), source.to(DEVICE), weight.to(DEVICE)
    (actual,) = triton_merge_frames.run([moved[0]], *moved[1:], n)
    assert actual.dtype == dtype and actual.shape == (n, *rest) and actual.is_contiguous()
    expected = native(x, source, weight, n)
    assert_within(actual, expected, 2 * rounding.merge_frames(x, source, weight, n))
    copies = weight[:n, 0] == 1
    assert torch.equal(actual.cpu()[copies], x[source[:n, 0][copies]])


@examples(12)
@given(
    seed=seeds,
    plan=merge_plans(),
    hidden=st.sampled_from([(5,), (729, 2), (33, 130), (0,)]),
    riders=st.lists(st.sampled_from([(), (1,), (729,), (5001,), (0,)]), min_size=1, max_size=2),
    kinds=st.lists(dtypes, min_size=3, max_size=3),
    layout=layouts,
)
def test_what_rides_along_has_the_bits_it_would_have_alone(seed, plan, hidden, riders, kinds, layout):
    source, weight, n = plan
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        laid_out(torch.randn(len(source), *rest, generator=generator).to(dtype), layout)
        for rest, dtype in zip([hidden, *riders], kinds, strict=False)
    ]
    for x, out in zip(tensors, merged_together(tensors, source, weight, n), strict=True):
        assert out.dtype == x.dtype and torch.equal(out, merged(x, source, weight, n))


@pytest.mark.parametrize("tensors, launches", [(1, 1), (2, 1), (3, 2)])
def test_two_tensors_take_one_launch(tensors, launches, monkeypatch):
    count, kernel = [], triton_merge_frames._merge
    monkeypatch.setattr(
        triton_merge_frames,
        "_merge",
        type("Counted", (), {"__getitem__": lambda _, grid: count.append(grid) or kernel[grid]})(),
    )
    x = torch.randn(3, 4)
    source, weight = torch.tensor([[0, 1], [2, 2], [0, 0]]), torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.0, 0.0]])
    for out in merged_together([x] * tensors, source, weight, 2):
        assert_within(out, native(x, source, weight, 2), 2 * rounding.merge_frames(x, source, weight, 2))
    assert len(count) == launches


@pytest.mark.parametrize("layout", ["rows apart", "plan apart"])
def test_strides_of_frames_and_plan(layout):
    x, source = torch.randn(6, 40), torch.tensor([[0, 1], [2, 2], [0, 0]])
    weight = torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.0, 0.0]])
    if layout == "rows apart":
        x = x[::2]
    else:
        x, source, weight = x[:3], source.t().contiguous().t(), weight.t().contiguous().t()
    bound = 2 * rounding.merge_frames(x, source, weight, 2)
    assert_within(merged(x, source, weight, 2), native(x, source, weight, 2), bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_untouched_frames_are_exact_copies_whatever_they_hold(dtype):
    x = torch.randn(4, 5).to(dtype)
    x[0, 0], x[0, 1], x[0, 2] = float("inf"), float("nan"), -0.0
    bits = BITS[x.element_size()]
    x.view(bits)[3, 0] = x.view(bits)[0, 1] + 1  # another NaN
    source = torch.tensor([[0, 0], [1, 2], [3, 3], [0, 0]])
    weight = torch.tensor([[1, 0], [0.5, 0.5], [1, 0], [0, 0.0]])
    out = merged(x, source, weight, 3)
    assert torch.equal(out[[0, 2]].view(bits), x[[0, 3]].view(bits))


def test_a_frame_of_weight_zero_cannot_leak_in():
    x = torch.tensor([[1.0], [float("inf")]])
    source, weight = torch.tensor([[0, 1], [0, 0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert merged(x, source, weight, 1).tolist() == [[1.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_blends_in_float32_with_float32_weights(dtype):
    x = torch.tensor([[60000.0, 70.0], [60000.0, -30.0]], dtype=dtype)
    source = torch.tensor([[0, 1], [0, 0]])
    assert merged(x, source, torch.tensor([[1.5, -0.5], [0, 0]]), 1)[0, 0] == x[0, 0]
    weight = torch.tensor([[0.3, 0.7], [0, 0]])
    (bound,) = rounding.merge_frames(x, source, weight, 1)
    assert_within(merged(x, source, weight, 1)[0, 1], torch.tensor(0.0), bound[1])


BAD_ROWS = [
    ([1, 4], [0.5, 0.5]),
    ([4, 4], [1.0, 0.0]),
    ([-1, 1], [0.5, 0.5]),
    ([1, -(2**40)], [1.0, 0.0]),
    ([2**40, 1], [0.5, 0.5]),
    ([1, 2], [float("nan"), 0.5]),
    ([1, 2], [0.5, float("inf")]),
    ([1, 1], [0.0, 0.0]),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sources, weights", BAD_ROWS)
def test_a_row_that_no_plan_means_is_nan_and_no_other_is(sources, weights, dtype):
    x = torch.ones(4, 9, dtype=dtype)
    source = torch.tensor([[0, 0], sources, [3, 3], [0, 0]])
    weight = torch.tensor([[1.0, 0.0], weights, [1.0, 0.0], [0.0, 0.0]])
    with pytest.raises(ValueError, match="merge_frames"):
        native(x, source, weight, 3)
    for out in merged_together([x, x[:, 0].float()], source, weight, 3):
        assert out[1].isnan().all() and out[[0, 2]].eq(1).all()


@pytest.mark.parametrize("n", [1, 2])
def test_everything_is_nan_if_the_plan_has_more_rows_than_n(n):
    source, weight = torch.tensor([[0, 0], [1, 1], [2, 2]]), torch.tensor([[1.0, 0.0]] * 3)
    assert all(out.isnan().all() for out in merged_together([torch.ones(3, 5), torch.ones(3)], source, weight, n))


@pytest.mark.parametrize("n, rest", [(0, (5,)), (2, (0,)), (2, (3, 0)), (0, ())])
def test_nothing_in_gives_nothing_out(n, rest):
    source, weight = torch.tensor([[0, 0], [1, 1]]), torch.tensor([[1.0, 0.0]] * 2)
    assert merged(torch.ones(2, *rest), source, weight, n).shape == (n, *rest)


def test_a_video_has_the_same_bits_in_any_batch_and_in_many_runs():
    x = torch.randn(5, 3, 11).bfloat16()
    source, weight = torch.tensor([[0, 0], [1, 2]]), torch.tensor([[1.0, 0.0], [0.3, 0.7]])
    empty = torch.zeros(3, 2)
    alone = merged(x[:3], source[[0, 1, 0]], torch.cat([weight, empty[:1]]), 2)
    source = torch.cat([torch.zeros(2, 2).long(), source + 2, torch.zeros(1, 2).long()])
    weight = torch.cat([torch.tensor([[1.0, 0.0], [0.5, 0.5]]), weight, empty[:1]])
    assert all(torch.equal(merged(x.roll(2, 0), source, weight, 4)[2:], alone) for _ in range(RUNS))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"x": torch.ones(4, 2)}, "over 3 frames cannot merge a tensor with 4"),
        ({"x": torch.ones(3, 2, dtype=torch.int64)}, "int64"),
        ({"source": torch.zeros(3, 2)}, "float32 with 2 axes"),
        ({"n": 4}, "n=4 of 3"),
        ({"n": -1}, "n=-1 of 3"),
    ],
)
def test_refuses_what_its_shape_tells(changes, says):
    given_ = {
        "x": torch.ones(3, 2),
        "source": torch.zeros(3, 2, dtype=torch.int64),
        "weight": torch.tensor([[1.0, 0.0]] * 3),
        "n": 3,
    } | changes
    for merge in (merged, native):
        with pytest.raises(ValueError, match=f"merge_frames.*{says}"):
            merge(*given_.values())


def test_is_the_provider_of_what_it_can_blend_in_float32():
    plan = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2)
    wide = torch.ones(3, 4, dtype=torch.float64)
    for dtype in DTYPES:
        x = torch.ones(3, 4, dtype=dtype)
        assert provider_of("merge_frames", "cuda", [x], *plan, 2) == "triton"
        assert provider_of("merge_frames", "cuda", [x, x[:, 0].float()], *plan, 2) == "triton"
        assert provider_of("merge_frames", "cuda", [x, wide], *plan, 2) == "native"
        assert provider_of("merge_frames", "cpu", [x], *plan, 2) == "native"


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from earlytom_compile.kernels import triton_merge_frames as module

kernel = module._merge
BLOCKS = {"BLOCK": module._BLOCK, "RIDER_BLOCK": 1024}  # the importance of 729 tokens
for name in ("fp32", "fp16", "bf16"):
    types = {"source": "*i64", "weight": "*fp32", "rider": "*fp32", "rider_out": "*fp32"}
    types |= {"x": "*" + name, "out": "*" + name}
    kinds = {arg: "constexpr" if arg in BLOCKS else types.get(arg, "i32") for arg in kernel.arg_names}
    whole = ("stride", "rest")  # 729 * 1152 elements: multiples of 16
    aligned = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(kinds) if arg in types or arg in whole}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=BLOCKS, attrs=aligned)
    options = {"enable_fp_fusion": False}
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    open(f"{sys.argv[1]}/{name}.cubin", "wb").write(binary.asm["cubin"])
    open(f"{sys.argv[1]}/{name}.ptx", "w").write(binary.asm["ptx"])
"""


@pytest.mark.long
def test_compiles_for_hopper_without_spills_and_with_wide_loads_and_stores(tmp_path):
    binaries = hopper.compiled(COMPILE, tmp_path)
    assert len(binaries) == 3
    for binary in binaries:
        hopper.no_spills(binary)
        ptx = binary.with_suffix(".ptx").read_text()
        assert "v4.b32" in ptx and "st.global.v4.b32" in ptx, binary.stem
