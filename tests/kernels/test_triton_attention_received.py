"""The Triton provider of attention_received: against the definition, the native body, itself, and ptxas."""

import numpy as np
import pytest
import rounding
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import DEVICE, DTYPES, RUNS, dtypes, laid_out, layouts, ops, seeds
from rounding import assert_within

triton = pytest.importorskip("triton")
import hopper  # noqa: E402

from earlytom_compile.kernels import triton_attention_received  # noqa: E402
from earlytom_compile.kernels.providers import provider_of  # noqa: E402

pytestmark = pytest.mark.gpu

ON_GPU = DEVICE == "cuda"
shapes = st.tuples(
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 5, 17, 64, 70, 129]),
    st.sampled_from([1, 8, 16, 24, 72, 80]),
)


def query_and_key(seed, shape, dtype=torch.float32):
    return 2 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def received(query, key, scale):
    return triton_attention_received.run(query.to(DEVICE), key.to(DEVICE), scale).cpu()


def defined(query, key, scale):
    """The whole map in float64, for small shapes."""
    scores = np.einsum("thid,thjd->thij", query.double().numpy(), key.double().numpy()) * scale
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return torch.from_numpy((exponentials / exponentials.sum(-1, keepdims=True)).mean((1, 2)))


def bound_of(query, key, scale):
    unit = rounding.unit_of_products(query.dtype)
    return rounding.attention_received(query, key, scale, unit, scores_twice=True)


@examples(8)
@given(
    seed=seeds,
    shape=shapes,
    dtype=dtypes,
    layout=st.tuples(layouts, layouts),
    scale=st.sampled_from([0.125, 1.0, 3.0, 0.0, -0.5]),
)
def test_is_the_native_operator_and_the_definition(seed, shape, dtype, layout, scale):
    query, key = query_and_key(seed, shape, dtype)
    actual = received(laid_out(query.to(DEVICE), layout[0]), laid_out(key.to(DEVICE), layout[1]), scale)
    assert actual.dtype == torch.float32 and actual.shape == (shape[0], shape[2]) and actual.is_contiguous()
    bound, native = bound_of(query, key, scale), ops.attention_received(query, key, scale)
    assert_within(actual, native, bound + rounding.attention_received(query, key, scale))
    assert_within(actual, defined(query, key, scale), bound)
    assert_within(actual.double().sum(1), torch.ones(shape[0]), bound.sum(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_heads_split_from_one_projection_where_they_lie(dtype):
    projected = query_and_key(3, (2, 70, 3 * 72), dtype).to(DEVICE)
    query, key = projected.view(2, 2, 70, 3, 72).transpose(2, 3)
    assert triton_attention_received._unit(query, key) == 16 // dtype.itemsize
    actual, query, key = received(query, key, 0.1), query.cpu(), key.cpu()
    assert_within(actual, defined(query, key, 0.1), bound_of(query, key, 0.1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_frame_has_the_same_bits_in_any_company_and_any_run(dtype):
    query, key = query_and_key(0, (3, 1, 70, 72), dtype).to(DEVICE)
    together = received(query, key, 0.2)
    for t in range(3):
        assert torch.equal(received(query[t : t + 1], key[t : t + 1], 0.2), together[t : t + 1])
    assert torch.equal(received(query[1:].flip(0), key[1:].flip(0), 0.2).flip(0), together[1:])
    assert all(torch.equal(received(query[:1], key[:1], 0.2), together[:1]) for _ in range(RUNS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_scores_neither_overflow_nor_lose_their_sum(dtype):
    query, key = (30 * query_and_key(1, (1, 2, 70, 8), dtype)).round()
    assert (query.float() @ key.float().transpose(-1, -2)).max() > 3e4
    actual = received(query, key, 1.0)
    assert_within(actual, defined(query, key, 1.0), bound_of(query, key, 1.0))
    # Scores of whole numbers are exact, and both kernels get the same: what is left are sums.
    assert_within(actual.double().sum(), torch.tensor(1.0), rounding.gamma(4 * 70 + 8))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("operand", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_frame_that_is_not_finite_is_nan_and_its_neighbours_are_not(operand, value):
    pair = query_and_key(2, (3, 2, 70, 24))
    pair[operand][1, 0, 69, 3] = value  # the last row is also what stands in for the rows after it
    actual, native = received(*pair, 1.0), ops.attention_received(*pair, 1.0)
    assert actual.isnan().any(1).tolist() == native.isnan().any(1).tolist() == [False, True, False]
    neighbours = pair[:, ::2]
    assert_within(actual[::2], defined(*neighbours, 1.0), bound_of(*neighbours, 1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])  # float32 in parts makes NaN of infinities
def test_key_out_of_reach_of_every_query_gets_nothing(dtype):
    query, key = query_and_key(4, (1, 1, 70, 8), dtype).abs()
    key[..., 3, :] = -torch.inf
    actual, rest = received(query, key, 1.0), torch.cat([key[..., :3, :], key[..., 4:, :]], 2)
    assert actual[0, 3] == 0
    without = actual[:, torch.arange(70) != 3]
    assert_within(without, defined(query, rest, 1.0), bound_of(query, rest, 1.0))


@pytest.mark.gpu(only=True)  # counts its memory
def test_keeps_nothing_as_large_as_an_attention_map():
    query, key = query_and_key(0, (4, 4, 729, 72), torch.bfloat16).to(DEVICE)
    received(query, key, 1.0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    received(query, key, 1.0)
    assert torch.cuda.max_memory_allocated() - before < 5 * 4 * 4 * 768 * 4


def test_allocates_nothing_as_large_as_an_attention_map(monkeypatch):
    sizes = []
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *a, **k: sizes.append((out := new_empty(*a, **k)).numel()) or out
    )
    received(*query_and_key(0, (1, 2, 129, 8)), 1.0)
    assert max(sizes) <= 2 * 192  # 2 heads of 129 tokens in blocks of 64


@pytest.mark.parametrize(
    "query, key, says",
    [
        (torch.ones(1, 2, 3, 4), torch.ones(1, 1, 3, 4), "repeat grouped key heads"),
        (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4).half(), "float16"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4), "3 axes"),
        (torch.ones(0, 2, 3, 4), torch.ones(0, 2, 3, 4), "empty"),
    ],
)
def test_refuses_what_the_native_operator_refuses(query, key, says):
    with pytest.raises(ValueError, match=f"attention_received.*{says}"):
        received(query, key, 1.0)


@pytest.mark.parametrize(
    "shape, dtype, provider",
    [
        ((2, 3, 5, 72), torch.bfloat16, "triton"),
        ((2, 3, 5, 72), torch.float16, "triton"),
        ((2, 3, 5, 80), torch.float32, "triton"),
        ((2, 3, 5, 128), torch.float32, "native"),
        ((2, 3, 5, 72), torch.float64, "native"),
        ((3, 5, 72), torch.float32, "native"),
    ],
)
def test_provider_is_chosen_by_dtype_and_head_dimension(shape, dtype, provider):
    x = torch.ones(shape, dtype=dtype, device="meta")
    assert provider_of("attention_received", "cuda", x, x, 1.0) == provider
    assert provider_of("attention_received", "cpu", x, x, 1.0) == "native"


COMPILE = """
import json, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from earlytom_compile.kernels import triton_attention_received as module

def compiled(kernel, pointers, constants, options):
    kinds = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    kinds |= {"scale": "fp32"} if "scale" in kinds else {}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds.values()) if kind[0] == "*"}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

for dtype, name in ((torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")):
    for width in (64, 72):
        options = module.launch_options(dtype, width, 16 // dtype.itemsize)
        launch = {key: options.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion")}
        outputs = ("largest_out", "inverse_out", "largest_in", "inverse_in", "received_out")
        pointers = {"query": "*" + name, "key": "*" + name, **dict.fromkeys(outputs, "*fp32")}
        for kernel in (module._row_statistics, module._column_sums):
            binary = compiled(kernel, pointers, options, launch)
            path = f"{sys.argv[1]}/{kernel.__name__}-{name}-{width}"
            open(path + ".cubin", "wb").write(binary.asm["cubin"])
            open(path + ".ptx", "w").write(binary.asm["ptx"])
compiled(module._mean_over_heads, {"received": "*fp32", "out": "*fp32"}, {"BLOCK": 256}, {})
"""


@pytest.mark.long
def test_compiles_for_hopper_without_spills_onto_tensor_cores_with_wide_loads(tmp_path):
    binaries = hopper.compiled(COMPILE, tmp_path)
    assert len(binaries) == 12
    for binary in binaries:
        hopper.no_spills(binary)
        ptx = binary.with_suffix(".ptx").read_text()
        assert "wgmma.mma_async" in ptx and "cp.async.cg.shared.global" in ptx, binary.stem
