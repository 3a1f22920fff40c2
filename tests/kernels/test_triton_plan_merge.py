"""The Triton providers of plan_merge and dynamic_frames: the native decisions to the last bit, and ptxas."""

import math
import re

import pytest
import test_ops_golden
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import DEVICE, RUNS, SEGMENT, counts_lists, ops, per_video, seeds, variants

triton = pytest.importorskip("triton")
import hopper  # noqa: E402

from earlytom_compile.kernels import triton_dynamic_frames, triton_plan_merge  # noqa: E402
from earlytom_compile.kernels.providers import provider_of  # noqa: E402

pytestmark = pytest.mark.gpu

interpreter_settings = examples(8)
SEGMENTATION = {"variant": "paper", "tau_seg": 0.5, "alpha": 0.9, "max_window": 0}
MERGE = {"tau_merge": SEGMENT, "min_frames": 1}


def plan_merge(similarity, counts, **options):
    source, weight, merged = triton_plan_merge.run(similarity.to(DEVICE), counts.to(DEVICE), **options)
    return source.cpu(), weight.cpu(), merged.cpu()


def dynamic_frames(similarity, counts, **options):
    return triton_dynamic_frames.run(similarity.to(DEVICE), counts.to(DEVICE), **options).cpu()


@st.composite
def problems(draw):
    """similarity [T, band], coarse or fine, NaN in some of it or where nothing may read it; counts; options."""
    counts = draw(st.one_of(counts_lists, st.sampled_from([[33], [70, 2]])))
    total = sum(counts)
    generator = torch.Generator().manual_seed(draw(seeds))
    similarity = torch.rand(total, max(1, total - 1), generator=generator) * 1.4 - 0.4
    levels = draw(st.sampled_from([2, 16, None]))
    if levels:
        similarity = (similarity * levels).round() / levels
    if draw(st.booleans()):
        hit = torch.rand(similarity.shape, generator=generator) < 0.05
        similarity[hit] = draw(st.sampled_from([math.nan, math.inf]))
    for rows in per_video(counts):
        for t in range(rows.start, rows.stop):
            similarity[t, t - rows.start :] = math.nan
    segmentation = {
        "variant": draw(variants),
        "tau_seg": draw(st.sampled_from([-2.0, 0.0, 0.3, 0.7, math.inf])),
        "alpha": draw(st.sampled_from([1.0, 0.9, 0.5, 0.0])),
        "max_window": draw(st.integers(0, 9)),
    }
    merge = {
        "tau_merge": draw(st.sampled_from([SEGMENT, -1.0, 0.25, 0.3, math.inf])),
        "min_frames": draw(st.sampled_from([-1, 0, 1, 2, 3, 5, 30, 50, 99])),
    }
    return similarity, torch.tensor(counts), segmentation, merge


@interpreter_settings
@given(problem=problems())
def test_is_the_native_plan_to_the_last_bit_or_none_where_that_refuses(problem):
    similarity, counts, segmentation, merge = problem
    actual = plan_merge(similarity, counts, **segmentation, **merge)
    try:
        expected = ops.plan_merge(similarity, counts, **segmentation, **merge)
    except ValueError:
        assert actual[2].eq(-1).all() and not actual[0].any() and not actual[1].any()
        return
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@interpreter_settings
@given(problem=problems())
def test_dynamic_frames_are_the_native_ones_or_none_where_that_refuses(problem):
    similarity, counts, segmentation, _ = problem
    actual = dynamic_frames(similarity, counts, **segmentation)
    try:
        expected = ops.dynamic_frames(similarity, counts, **segmentation)
    except ValueError:
        expected = torch.zeros_like(actual)
    assert actual.dtype == torch.bool and torch.equal(actual, expected)


@interpreter_settings
@given(counts=counts_lists, seed=seeds, variant=variants)
def test_a_video_is_planned_alone_as_in_a_batch(counts, seed, variant):
    similarity = torch.rand(sum(counts), 8, generator=torch.Generator().manual_seed(seed))
    segmentation = SEGMENTATION | {"variant": variant}
    source, weight, merged = plan_merge(similarity, torch.tensor(counts), **segmentation, **MERGE)
    dynamic = dynamic_frames(similarity, torch.tensor(counts), **segmentation)
    for video, (rows, out) in enumerate(zip(per_video(counts), per_video(merged.tolist()), strict=True)):
        one = similarity[rows], torch.tensor([counts[video]])
        alone = plan_merge(*one, **segmentation, **MERGE)
        left = merged[video]
        assert alone[2].item() == left and torch.equal(alone[1][:left], weight[out])
        assert torch.equal(alone[0][:left] + rows.start, source[out])
        assert torch.equal(dynamic_frames(*one, **segmentation), dynamic[rows])


@pytest.mark.parametrize("most", [0, 1, 20, 34, 35])
def test_the_floor_holds_over_more_pairs_than_lanes(most):
    similarity = torch.rand(110, 1, generator=torch.Generator().manual_seed(most)).mul(16).round() / 16 + 1
    options = SEGMENTATION | {"tau_seg": -1.0, "tau_merge": 0.0, "min_frames": 110 - most}
    actual = plan_merge(similarity, torch.tensor([110]), **options)
    assert actual[2].item() == 110 - most
    for one, other in zip(actual, ops.plan_merge(similarity, torch.tensor([110]), **options), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_has_the_same_bits_in_many_runs_and_for_any_strides(variant):
    similarity = torch.rand(32, 31, generator=torch.Generator().manual_seed(1))
    counts = torch.tensor([20, 12])
    options = SEGMENTATION | MERGE | {"variant": variant, "tau_seg": 0.3, "min_frames": 15}
    segmentation = {name: options[name] for name in SEGMENTATION}
    first, dynamic = plan_merge(similarity, counts, **options), dynamic_frames(similarity, counts, **segmentation)
    assert first[2].sum() < 32
    apart = similarity.t().contiguous().t(), torch.stack([counts, -counts], 1)[:, 0]
    for run in range(RUNS):
        inputs = (similarity, counts) if run else apart
        again = plan_merge(*inputs, **options)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
        assert torch.equal(dynamic_frames(*inputs, **segmentation), dynamic)


@pytest.mark.parametrize(
    "counts", [[3, 2], [4, 3], [7, -1], [0, 6], [6, 0], [2**32 + 3, 3], [2**62, 2**62], [-(2**63), 6], [1] * 5]
)
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_counts_that_mean_nothing_stay_in_bounds_and_plan_nothing(counts, variant):
    segmentation = SEGMENTATION | {"variant": variant}
    similarity = torch.ones(6, 5)
    source, weight, merged = plan_merge(similarity, torch.tensor(counts), **segmentation, **MERGE)
    assert merged.tolist() == [-1] * len(counts) and not source.any() and not weight.any()
    assert not dynamic_frames(similarity, torch.tensor(counts), **segmentation).any()


def test_a_band_too_narrow_for_a_video_plans_nothing():
    similarity, counts = torch.ones(6, 2), torch.tensor([2, 4])
    source, weight, merged = plan_merge(similarity, counts, **SEGMENTATION, **MERGE)
    assert merged.tolist() == [-1, -1] and not source.any() and not weight.any()
    segmentation = SEGMENTATION | {"variant": "released"}
    assert not dynamic_frames(similarity, counts, **segmentation).any()
    assert dynamic_frames(similarity, torch.tensor([3, 3]), **segmentation).any()


@pytest.mark.parametrize(
    "similarity, counts, changes, says",
    [
        (torch.ones(4, 3).double(), [4], {}, "float64"),
        (torch.ones(4), [4], {}, "1 axes"),
        (torch.ones(4, 3), [], {}, "counts of 0 videos over 4 frames"),
        (torch.ones(4, 3), [1] * 5, {}, "counts of 5 videos over 4 frames"),
        (torch.ones(4, 2), [4], {}, "band of 2 frames, these options need 3"),
        (torch.ones(9, 1), [4, 5], {"max_window": 3}, "band of 1 frames, these options need 2"),
        (torch.ones(9, 5), [9], {"variant": "released", "max_window": 8}, "band of 5.*need 6"),
        (torch.ones(4, 3), [4], {"variant": "papers"}, "variant='papers'"),
        (torch.ones(4, 3), [4], {"tau_seg": math.nan}, "tau_seg=nan"),
        (torch.ones(4, 3), [4], {"alpha": 1.5}, "alpha=1.5"),
        (torch.ones(4, 3), [4], {"max_window": -1}, "max_window=-1"),
    ],
)
def test_refuses_what_is_wrong_without_a_look_at_values(similarity, counts, changes, says):
    counts = torch.tensor(counts, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"plan_merge.*{says}"):
        plan_merge(similarity, counts, **SEGMENTATION | MERGE | changes)


def test_provider_needs_counts_beside_the_similarity():
    similarity, counts = torch.ones(4, 3, device="meta"), torch.ones(1, dtype=torch.int64, device="meta")
    for name, options in (("plan_merge", SEGMENTATION | MERGE), ("dynamic_frames", SEGMENTATION)):
        assert provider_of(name, "cuda", similarity, counts, **options) == "triton"
        assert provider_of(name, "cpu", similarity, counts, **options) == "native"
        assert provider_of(name, "cuda", similarity, torch.tensor([4]), **options) == "native"
        assert provider_of(name, "cuda", similarity.double(), counts, **options) == "native"


class Providers:
    """The operators of a golden merge layer, with those of this file as Triton computes them."""

    plan_merge = staticmethod(plan_merge)
    dynamic_frames = staticmethod(dynamic_frames)
    frame_similarity = ops.frame_similarity
    merge_frames = ops.merge_frames


@test_ops_golden.golden("stage1")
def test_golden_merge_layer(scalars, tensors, monkeypatch):
    monkeypatch.setattr(test_ops_golden, "ops", Providers)
    test_ops_golden.test_one_merge_layer(scalars, tensors)


COMPILE = """
import itertools, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from earlytom_compile.kernels import triton_dynamic_frames, triton_plan_merge

TYPES = {
    "similarity": "*fp32", "counts": "*i64", "near": "*fp32", "role": "*i32", "source": "*i64", "weight": "*fp32",
    "merged_counts": "*i64", "dynamic": "*i1",
    "newest": "fp32", "older": "fp32", "tau_seg": "fp32", "tau_merge": "fp32",
}

def binary(kernel, constants):
    kinds = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants)
    options = {"num_warps": 1, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm

for paper, segment in itertools.product((True, False), repeat=2):
    plan = binary(triton_plan_merge._plan, {"PAPER": paper, "BY_SEGMENT": segment, "BLOCK": 32})
    flags = binary(triton_dynamic_frames._flag_ends, {"PAPER": paper, "BLOCK": 128})
    for name, asm in (("plan", plan), ("flags", flags)):
        open(f"{sys.argv[1]}/{name}-{paper}-{segment}.cubin", "wb").write(asm["cubin"])
        open(f"{sys.argv[1]}/{name}-{paper}-{segment}.ptx", "w").write(asm["ptx"])
"""


@pytest.mark.long
def test_compiles_for_hopper_without_spills_and_rounds_like_the_native_body(tmp_path):
    binaries = hopper.compiled(COMPILE, tmp_path)
    assert len(binaries) == 8
    for binary in binaries:
        listing = hopper.no_spills(binary)
        fused = re.findall(r"FFMA R\d+, (?!RZ)", listing)  # RZ is 0: part of a division of float64
        assert "FMUL" in listing and not fused and ".FTZ" not in listing, binary.stem
        ptx = binary.with_suffix(".ptx").read_text()
        assert "div.full" not in ptx and ("div.rn.f64" in ptx) == binary.stem.startswith("plan"), binary.stem
