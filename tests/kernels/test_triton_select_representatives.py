"""The Triton provider of select_representatives: the choice of the native operator, and ptxas."""

import pytest
import test_select_representatives
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import DEVICE, RUNS, laid_out, layouts, ops
from test_select_representatives import budget_of, tokens_of_few_kinds, videos

pytest.importorskip("triton")
import hopper  # noqa: E402

from earlytom_compile.kernels import triton_select_representatives  # noqa: E402
from earlytom_compile.kernels.providers import provider_of  # noqa: E402

pytestmark = pytest.mark.gpu

interpreter_settings = examples(8)


def select(features, counts, budget):
    found = triton_select_representatives.run(features.to(DEVICE), counts.to(DEVICE), budget)
    return tuple(part.cpu() for part in found)


@interpreter_settings
@given(video=videos(), share=st.floats(0, 1), layout=layouts)
def test_takes_what_adds_most_by_the_rules_read_literally(video, share, layout):
    features, counts = video
    budget = budget_of(features, counts, share)
    features = features if features.dtype.itemsize <= 4 else features.float()
    tokens, kept = select(laid_out(features, layout), torch.tensor(counts), budget)
    test_select_representatives.check(features, counts, budget, tokens, kept)


CASES = [([8], 16, 64, 13), ([32], 20, 70, 64), ([9, 17], 33, 8, 100), ([1], 5, 4, 2), ([3, 8, 16], 17, 130, 20)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts, tokens, channels, budget", CASES)
def test_is_the_native_choice(counts, tokens, channels, budget, dtype):
    features = tokens_of_few_kinds(budget, sum(counts), tokens, channels, kinds=9, noise=0.3).to(dtype)
    found = select(features, torch.tensor(counts), budget)
    expected = ops.select_representatives(features, torch.tensor(counts), budget)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_is_the_same_in_many_runs_alone_and_in_a_batch():
    features, counts = tokens_of_few_kinds(1, 17, 9, 16, kinds=6, noise=0.2), torch.tensor([9, 8])
    first = select(features, counts, 20)
    for _ in range(RUNS):
        assert all(torch.equal(a, b) for a, b in zip(select(features, counts, 20), first, strict=True))
    for video, rows in enumerate((slice(0, 9), slice(9, 17))):
        alone = select(features[rows], counts[video : video + 1], 20)
        assert all(torch.equal(a[0], b[video]) for a, b in zip(alone, first, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_gives_tokens_of_nan_in_its_video_alone(bad):
    features = tokens_of_few_kinds(2, 20, 5, 8, kinds=4, noise=0.2)
    expected = ops.select_representatives(features, torch.tensor([10, 10]), 7)
    features[3, 2, 1] = bad
    tokens, kept = select(features, torch.tensor([10, 10]), 7)
    assert tokens[0].isnan().all()
    assert torch.equal(tokens[1], expected[0][1]) and torch.equal(kept[1], expected[1][1])


@pytest.mark.parametrize("counts", [[3, 2], [7, -1], [0, 6], [2**32 + 3, 3], [2**62, 2**62], [1, 1, 1]])
def test_counts_that_mean_nothing_keep_nothing(counts):
    tokens, kept = select(torch.randn(6, 5, 3), torch.tensor(counts), 7)
    assert kept.eq(-1).all() and tokens.eq(0).all()


def test_rows_without_a_token_are_marked():
    features = torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(0))
    tokens, kept = select(features, torch.tensor([1, 3]), 6)
    assert kept[0].tolist() == [[-1, -1], [-1, -1], [0, 0], [0, 1], [0, 2], [0, 3]]
    assert torch.equal(tokens[0, 2:], features[0]) and not tokens[0, :2].any()
    alone = ops.select_representatives(features[1:], torch.tensor([3]), 6)
    assert torch.equal(tokens[1], alone[0][0]) and torch.equal(kept[1], alone[1][0])


def test_it_computes_what_it_says_it_supports():
    features, counts = torch.empty(4, 3, 2), torch.tensor([4])
    assert provider_of("select_representatives", "cuda", features, counts, 2) == "triton"
    assert provider_of("select_representatives", "cuda", features.double(), counts, 2) == "native"


CODE = """
import sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from earlytom_compile.kernels import triton_select_representatives as module

kernel, options = module._cover, {"num_warps": 8, "enable_fp_fusion": False}
constants = {
    "channel_stride": 1, "STRIPS": 13, "WIDTH": 16, "PADDED": 256, "CHANNELS": module._BLOCK_CHANNELS, "BLOCK": 128,
    "VIDEOS": 1,
}
for name, kind in (("float32", "*fp32"), ("bfloat16", "*bf16")):
    pointers = {"features": kind, "counts": "*i64", "mean": "*fp32", "length": "*fp32", "gain": "*i32", "place": "*i64"}
    pointers["broken"] = "*i1"
    kinds = {arg: "constexpr" if arg in constants else pointers.get(arg, "i32") for arg in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds.values()) if kind[0] == "*"}
    source = ASTSource(kernel, kinds, constants, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    (Path(sys.argv[1]) / f"{name}.cubin").write_bytes(binary.asm["cubin"])
"""


def test_no_register_is_spilled_on_an_h200(tmp_path):
    binaries = hopper.compiled(CODE, tmp_path)
    assert len(binaries) == 2
    for binary in binaries:
        hopper.no_spills(binary)
