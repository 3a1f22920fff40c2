"""The Triton providers around the layers that reuse: against the native bodies, bit for bit where they copy."""

import pytest
import rounding
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import DEVICE, DTYPES, RUNS, active_places, dtypes, laid_out, layouts, ops, seeds, sources
from rounding import assert_within
from test_pack_places import drawn, shares

triton = pytest.importorskip("triton")
import hopper  # noqa: E402

from earlytom_compile.kernels import (  # noqa: E402
    triton_pack_places,
    triton_return_places,
    triton_spread_places,
    triton_take_places,
)
from earlytom_compile.kernels.providers import provider_of  # noqa: E402

pytestmark = pytest.mark.gpu

some = examples(12)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 5, 37, 257, 600]))
BITS = {2: torch.int16, 4: torch.int32}


def on_device(provider, *arguments):
    moved = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments]
    out = provider.run(*moved)
    return out.cpu() if isinstance(out, torch.Tensor) else [x.cpu() for x in out]


def packed(source):
    return ops.pack_places(source, active_places(source))


@some
@given(seed=seeds, shape=shapes, share=shares)
def test_numbers_places_as_the_native_operator(seed, shape, share):
    source = sources(seed, *shape, share)
    apart = source.transpose(0, 2).contiguous().transpose(0, 2)
    for part, expected in zip(on_device(triton_pack_places, apart, active_places(source)), packed(source), strict=True):
        assert part.dtype == torch.int64 and part.is_contiguous() and torch.equal(part, expected)


def test_more_frames_than_are_added_up_at_a_time(monkeypatch):
    monkeypatch.setattr(triton_pack_places, "_BLOCK", 4)
    source = sources(0, 3, 5, 9)
    parts = on_device(triton_pack_places, source, active_places(source))
    assert all(torch.equal(part, expected) for part, expected in zip(parts, packed(source), strict=True))


@pytest.mark.parametrize("total", [3, 4, 6, 9])
def test_a_plan_of_another_total_stays_inside(total):
    source = torch.tensor([[[0, 0, 0], [0, 1, 1], [2, 1, 9]]])  # 6 active places, and a source that does not exist
    index, rows, offsets = on_device(triton_pack_places, source, total)
    assert index.shape == (total,) and ((index >= 0) & (index < 9)).all()
    assert ((rows >= 0) & (rows < total)).all()
    assert offsets[0] == 0 and offsets[-1] == min(total, 6) and (offsets.diff() >= 0).all()


@some
@given(seed=seeds, shape=shapes, share=shares, channels=st.sampled_from([1, 5, 72, 2049]), dtype=dtypes, layout=layouts)
def test_takes_what_the_native_operator_takes(seed, shape, share, channels, dtype, layout):
    source = sources(seed, *shape, share)[..., :37]
    hidden = drawn(seed, shape[0] * shape[1], source.shape[2], channels, dtype=dtype)
    index, _, _ = packed(source)
    taken = on_device(triton_take_places, laid_out(hidden, layout), index)
    assert taken.dtype == dtype and taken.is_contiguous() and torch.equal(taken, ops.take_places(hidden, index))


@some
@given(
    seed=seeds,
    shape=shapes,
    share=shares,
    channels=st.sampled_from([1, 5, 72, 2049]),
    dtype=dtypes,
    layout=st.tuples(layouts, layouts),
)
def test_gives_back_what_the_native_operator_gives_back(seed, shape, share, channels, dtype, layout):
    source = sources(seed, *shape, share)[..., :37]
    hidden = drawn(seed, shape[0] * shape[1], source.shape[2], channels, dtype=dtype)
    index, rows, _ = packed(source)
    new = drawn(seed + 1, 1, len(index), channels, dtype=dtype)
    out = on_device(triton_return_places, laid_out(hidden, layout[0]), laid_out(new, layout[1]), index, rows)
    expected = ops.return_places(hidden, new, index, rows)
    assert out.dtype == dtype and out.is_contiguous()
    assert torch.equal(out.flatten(0, 1)[index], new[0])
    if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter cuts off
        assert_within(out, expected, rounding.return_places(hidden, new, index, rows))
    else:
        assert torch.equal(out, expected)


@some
@given(
    seed=seeds, shape=shapes, share=shares, heads=st.sampled_from([1, 3]), width=st.sampled_from([1, 8, 72]),
    dtype=dtypes, layout=layouts,
)  # fmt: skip
def test_spreads_what_the_native_operator_spreads(seed, shape, share, heads, width, dtype, layout):
    source = sources(seed, *shape, share)[..., :37]
    index, rows, _ = packed(source)
    given_ = drawn(seed, 1, heads, len(index), width, dtype=dtype)
    spread, expected = on_device(triton_spread_places, laid_out(given_, layout), rows), ops.spread_places(given_, rows)
    assert spread.dtype == dtype and spread.stride() == expected.stride() and torch.equal(spread, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_active_places_are_exact_copies_whatever_they_hold(dtype):
    source = torch.tensor([[[0, 0, 0], [0, 1, 0]]])
    index, rows, _ = packed(source)
    hidden, new = torch.full((2, 3, 1), float("inf"), dtype=dtype), torch.ones(1, 4, 1, dtype=dtype)
    new[0, :3, 0] = torch.tensor([float("nan"), float("inf"), -0.0])
    out = on_device(triton_return_places, hidden, new, index, rows)
    bits = BITS[out.element_size()]
    assert torch.equal(out.view(-1)[index].view(bits), new[0, :, 0].view(bits))
    assert out[1, [0, 2]].isnan().all()


def test_numbers_outside_touch_nothing_outside():
    """Numbers that no plan has, which the host does not see: what comes out is made of what went in."""
    hidden = torch.arange(6.0).view(2, 3, 1) + 1
    index, rows = torch.tensor([-5, 2, 99, 3]), torch.tensor([[-1, 0, 1], [2, 3, 77]])
    assert on_device(triton_take_places, hidden, index).flatten().tolist() == [1, 3, 6, 4]
    three = hidden.view(1, 1, 6, 1)
    assert on_device(triton_spread_places, three[:, :, :4], rows).flatten().tolist() == [1, 1, 2, 3, 4, 4]
    assert on_device(triton_return_places, hidden, hidden.view(1, 6, 1)[:, :4], index, rows).isfinite().all()


def test_has_the_same_bits_in_any_run():
    source = sources(5, 2, 3, 9)
    index, rows, _ = packed(source)
    hidden, new = drawn(0, 6, 9, 72), drawn(1, 1, len(index), 72)
    first = on_device(triton_return_places, hidden, new, index, rows)
    assert all(torch.equal(on_device(triton_return_places, hidden, new, index, rows), first) for _ in range(RUNS))


def test_launches_as_often_as_is_written(monkeypatch):
    launches = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launches.append(grid)
            return self.kernel[grid]

    kernels = {
        triton_pack_places: ("_rank", "_sum_up", "_number"),
        triton_take_places: ("_copy_rows",),
        triton_return_places: ("_return",),
    }
    for module, names in kernels.items():
        for name in names:
            monkeypatch.setattr(module, name, Counted(getattr(module, name)))
    source = sources(5, 2, 4, 5)
    index, rows, _ = packed(source)
    hidden, new = drawn(0, 8, 5, 8), drawn(1, 1, len(index), 8)
    for provider, arguments, expected in (
        (triton_pack_places, (source, len(index)), 3),
        (triton_take_places, (hidden, index), 1),
        (triton_return_places, (hidden, new, index, rows), 1),
        (triton_spread_places, (new.view(1, -1, 2, 4).transpose(1, 2), rows), 1),
    ):
        launches.clear()
        on_device(provider, *arguments)
        assert len(launches) == expected


@pytest.mark.gpu(only=True)  # what waits for the device raises
def test_never_wait_for_the_device():
    source = sources(5, 2, 4, 37).to(DEVICE)
    total = active_places(source)
    hidden, new = drawn(0, 8, 37, 8).to(DEVICE), drawn(1, 1, total, 8).to(DEVICE)

    def everything():
        index, rows, _ = ops.pack_places(source, total)
        ops.take_places(hidden, index)
        ops.return_places(hidden, new, index, rows)
        ops.spread_places(new.view(1, -1, 2, 4).transpose(1, 2), rows)

    everything()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "provider, arguments, says",
    [
        (triton_pack_places, (torch.zeros(1, 2, 3, dtype=torch.int64), 7), "pack_places.*total=7"),
        (triton_take_places, (torch.ones(2, 3), torch.tensor([0])), "take_places.*2 axes"),
        (
            triton_return_places,
            (torch.ones(2, 3, 4), torch.ones(1, 3, 4), torch.arange(4), torch.zeros(2, 3, dtype=torch.int64)),
            "return_places.*must be",
        ),
        (triton_spread_places, (torch.ones(1, 0, 4, 3), torch.zeros(2, 3, dtype=torch.int64)), "spread_places.*empty"),
    ],
)
def test_refuses_what_its_shape_tells(provider, arguments, says):
    with pytest.raises(ValueError, match=says):
        on_device(provider, *arguments)


def test_are_the_providers_of_what_they_can_add_in_float32():
    source = sources(5, 1, 2, 3)
    index, rows, _ = packed(source)
    assert provider_of("pack_places", "cuda", source, len(index)) == "triton"
    for dtype, expected in (*((dtype, "triton") for dtype in DTYPES), (torch.float64, "native")):
        hidden, new = torch.ones(2, 3, 4, dtype=dtype), torch.ones(1, len(index), 4, dtype=dtype)
        assert provider_of("take_places", "cuda", hidden, index) == expected
        assert provider_of("return_places", "cuda", hidden, new, index, rows) == expected
        assert provider_of("spread_places", "cuda", new[:, None], rows) == expected
        assert provider_of("take_places", "cpu", hidden, index) == "native"


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from earlytom_compile.kernels import triton_return_places, triton_take_places

for name in ("fp32", "fp16", "bf16"):
    types = dict.fromkeys(("x", "out", "hidden", "packed"), "*" + name)
    types |= dict.fromkeys(("numbers", "index", "rows"), "*i64")
    for kernel in (triton_take_places._copy_rows, triton_return_places._return):
        constants = {"BLOCK": triton_take_places._ROW_BLOCK}
        kinds = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names}
        whole = ("frame_stride", "place_stride", "packed_stride", "width")  # 1152 channels: multiples of 16
        aligned = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(kinds) if arg in types or arg in whole}
        source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
        binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
        open(f"{sys.argv[1]}/{kernel.__name__}-{name}.cubin", "wb").write(binary.asm["cubin"])
        open(f"{sys.argv[1]}/{kernel.__name__}-{name}.ptx", "w").write(binary.asm["ptx"])
"""


@pytest.mark.long
def test_compiles_for_hopper_without_spills_and_with_wide_loads_and_stores(tmp_path):
    binaries = hopper.compiled(COMPILE, tmp_path)
    assert len(binaries) == 6
    for binary in binaries:
        hopper.no_spills(binary)
        ptx = binary.with_suffix(".ptx").read_text()
        assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx, binary.stem
