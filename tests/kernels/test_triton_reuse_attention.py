"""The Triton provider of reuse_attention: against the definition, the native body, itself, and ptxas."""

import plain_python
import pytest
import rounding
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import DEVICE, DTYPES, RUNS, dtypes, laid_out, layouts, ops, seeds, sources
from rounding import assert_within
from test_reuse_attention import bound_of, packed_for_attention, shares

triton = pytest.importorskip("triton")
import hopper  # noqa: E402

from earlytom_compile.kernels import triton_reuse_attention  # noqa: E402
from earlytom_compile.kernels.providers import provider_of  # noqa: E402

pytestmark = pytest.mark.gpu

shapes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 5, 17, 64, 70, 129]))


def attended(query, key, value, rows, offsets, scale):
    moved = [x.to(DEVICE) for x in (query, key, value, rows, offsets)]
    return triton_reuse_attention.run(*moved, scale).cpu()


def bounds(inputs, scale):
    """(of the provider, of the native body)."""
    return bound_of(*inputs, scale, rounding.unit_of_products(inputs[0].dtype)), bound_of(*inputs, scale)


@examples(8)
@given(
    seed=seeds,
    shape=shapes,
    share=shares,
    heads=st.integers(1, 2),
    width=st.sampled_from([1, 8, 16, 24, 72, 80]),
    dtype=dtypes,
    layout=st.tuples(layouts, layouts, layouts),
    scale=st.sampled_from([0.125, 1.0, 3.0, 0.0, -0.5]),
)
def test_is_the_native_operator(seed, shape, share, heads, width, dtype, layout, scale):
    inputs = packed_for_attention(seed, sources(seed, *shape, share), heads, width, dtype)
    laid = [laid_out(x.to(DEVICE), how) for x, how in zip(inputs, layout, strict=False)]
    actual, expected = attended(*laid, *inputs[3:], scale), ops.reuse_attention(*inputs, scale)
    assert actual.dtype == dtype and actual.stride() == expected.stride()
    assert_within(actual, expected, sum(bounds(inputs, scale)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_definition(dtype):
    inputs = packed_for_attention(3, sources(3, 2, 3, 9), 2, 24, dtype)
    wide = [x[0].double().numpy() for x in inputs[:3]]
    expected = plain_python.reuse_attention(*wide, inputs[3].tolist(), inputs[4].tolist(), 0.3)
    assert_within(attended(*inputs, 0.3)[0], torch.from_numpy(expected), bounds(inputs, 0.3)[0][0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_heads_split_from_one_projection_where_they_lie(dtype):
    source = sources(4, 1, 3, 70)
    _, rows, offsets = ops.pack_places(source, total := int((source == torch.arange(3)[:, None]).sum()))
    projected = torch.randn(1, total, 3 * 3 * 72, generator=torch.Generator().manual_seed(0)).to(dtype)
    three = projected.view(1, total, 3, 3, 72).permute(2, 0, 3, 1, 4)
    assert triton_reuse_attention._unit(*three) == 16 // dtype.itemsize
    inputs = (*three, rows, offsets)
    assert_within(attended(*inputs, 0.1), ops.reuse_attention(*inputs, 0.1), sum(bounds(inputs, 0.1)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_frame_has_the_same_bits_in_any_company_and_any_run(dtype):
    source = torch.arange(3)[:, None].expand(1, 3, 70).clone()
    source[0, 2] = 1  # without queries
    query, key, value, rows, offsets = inputs = packed_for_attention(0, source, 1, 72, dtype)
    together = attended(*inputs, 0.2)
    for n in range(2):
        start, stop = offsets[n], offsets[n + 1]
        own = [x[:, :, start:stop] for x in (query, key, value)]
        alone = attended(*own, rows[n : n + 1] - start, offsets[n : n + 2] - start, 0.2)
        assert torch.equal(alone, together[:, :, start:stop])
    assert all(torch.equal(attended(*inputs, 0.2), together) for _ in range(RUNS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_scores_neither_overflow_nor_lose_their_sum(dtype):
    query, key, value, rows, offsets = packed_for_attention(1, sources(1, 1, 2, 70), 2, 8, dtype)
    inputs = ((30 * query).round(), (30 * key).round(), torch.ones_like(value), rows, offsets)
    assert (inputs[0].float() @ inputs[1].float().transpose(-1, -2)).max() > 3e4
    out = attended(*inputs, 1.0)
    assert (out.double() - 1).abs().max() <= torch.finfo(dtype).eps


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("operand", [1, 2])
def test_a_row_that_is_not_finite_stays_in_the_frames_that_read_it(operand):
    source = torch.zeros(1, 3, 70, dtype=torch.int64)
    source[0, 1, 69], source[0, 2] = 1, 2
    inputs = packed_for_attention(2, source, 2, 24)
    inputs[operand][0, :, 70] = float("nan")  # the one that frame 1 computed, which stands in for rows behind it
    nan = attended(*inputs, 1.0)[0].isnan()
    assert nan.any(-1).all(0).tolist() == [False] * 70 + [True] + [False] * 70
    assert not nan[:, torch.arange(141) != 70].any()


def test_rows_and_offsets_outside_touch_nothing_outside():
    """Numbers that no plan has, which the host does not see."""
    query, key, value, rows, offsets = packed_for_attention(2, sources(2, 1, 3, 5), 2, 8)
    wild = rows.clone()
    wild[0, 0], wild[1, 1] = -7, 10**6
    assert attended(query, key, value, wild, offsets, 1.0).shape == query.shape
    beyond = offsets.clone()
    beyond[-1] += 3
    assert torch.equal(attended(query, key, value, rows, beyond, 1.0), attended(query, key, value, rows, offsets, 1.0))


def test_is_one_launch_and_gathers_nothing(monkeypatch):
    grids, sizes, kernel, new_empty = [], [], triton_reuse_attention._attend, torch.Tensor.new_empty
    counted = type("Counted", (), {"__getitem__": lambda _, grid: grids.append(grid) or kernel[grid]})()
    monkeypatch.setattr(triton_reuse_attention, "_attend", counted)
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *a, **k: sizes.append((out := new_empty(*a, **k)).numel()) or out
    )
    inputs = packed_for_attention(0, sources(0, 2, 3, 129), 2, 8)
    sizes.clear()
    attended(*inputs, 1.0)
    fixed = triton_reuse_attention.launch_options(torch.float32, 8, 1)["FIXED"]
    assert grids == [(-(-129 // fixed), 12)]
    assert max(sizes) == sum(sizes) == inputs[0].numel(), "nothing but the output (the interpreter makes empty ones)"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"query": torch.ones(2, 4, 3)}, "3 axes"),
        ({"key": torch.ones(1, 1, 4, 3)}, "repeat grouped heads"),
        ({"offsets": torch.tensor([0, 4])}, "2 offsets"),
    ],
)
def test_refuses_what_its_shape_tells(changes, says):
    x = torch.ones(1, 2, 4, 3)
    arguments = {"query": x, "key": x, "value": x, "rows": torch.tensor([[0, 1, 2], [0, 3, 2]])}
    arguments |= {"offsets": torch.tensor([0, 3, 4])} | changes
    with pytest.raises(ValueError, match=f"reuse_attention.*{says}"):
        attended(*arguments.values(), 1.0)


def test_is_the_provider_of_heads_whose_tiles_fit():
    rows, offsets = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 3, 4])
    for dtype, width, expected in (
        (torch.float32, 80, "triton"), (torch.float32, 96, "native"), (torch.bfloat16, 160, "triton"),
        (torch.float16, 192, "native"), (torch.float64, 16, "native"),
    ):  # fmt: skip
        x = torch.ones(1, 2, 4, width, dtype=dtype)
        assert provider_of("reuse_attention", "cuda", x, x, x, rows, offsets, 1.0) == expected
        assert provider_of("reuse_attention", "cpu", x, x, x, rows, offsets, 1.0) == "native"


COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from earlytom_compile.kernels import triton_reuse_attention as module

kernel = module._attend
for dtype, name in ((torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")):
    for width in (64, 72):
        options = module.launch_options(dtype, width, 16 // dtype.itemsize)
        launch = {key: options.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion")}
        types = dict.fromkeys(("query", "key", "value", "out"), "*" + name)
        types |= {"rows": "*i64", "offsets": "*i64", "scale": "fp32"}
        kinds = {arg: "constexpr" if arg in options else types.get(arg, "i32") for arg in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds.values()) if kind[0] == "*"}
        source = ASTSource(fn=kernel, signature=kinds, constexprs=options, attrs=aligned)
        binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch)
        path = f"{sys.argv[1]}/{name}-{width}"
        open(path + ".cubin", "wb").write(binary.asm["cubin"])
        open(path + ".ptx", "w").write(binary.asm["ptx"])
"""


@pytest.mark.long
def test_compiles_for_hopper_without_spills_onto_tensor_cores_with_wide_loads(tmp_path):
    binaries = hopper.compiled(COMPILE, tmp_path)
    assert len(binaries) == 6
    for binary in binaries:
        hopper.no_spills(binary)
        ptx = binary.with_suffix(".ptx").read_text()
        assert "wgmma.mma_async" in ptx and "cp.async.cg.shared.global" in ptx, binary.stem
