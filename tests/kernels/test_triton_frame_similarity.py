"""The Triton provider of frame_similarity: against the definition, the native body, itself, and ptxas."""

import re

import plain_python
import pytest
import rounding
import torch
from effort import cases, examples
from hypothesis import example, given
from hypothesis import strategies as st
from op_inputs import DEVICE, DTYPES, RUNS, counts_lists, dtypes, laid_out, layouts, ops, per_video, seeds, video
from rounding import assert_within

triton = pytest.importorskip("triton")
import hopper  # noqa: E402

from earlytom_compile.kernels import triton_frame_similarity  # noqa: E402
from earlytom_compile.kernels.frame_similarity import frame_similarity as declared  # noqa: E402
from earlytom_compile.kernels.providers import provider_of  # noqa: E402

pytestmark = pytest.mark.gpu

some = examples(8)
shapes = st.tuples(st.integers(1, 12), st.integers(1, 7), st.sampled_from([1, 9, 72, 130]))


def comparable(hidden):
    """On a CPU, ``hidden`` rounded so far that float32 holds its products and their sums: the interpreter multiplies
    by BLAS, whose sums depend on where in a matrix a row lies, which those of a GPU do not. Nothing becomes zero."""
    return hidden if DEVICE == "cuda" else (hidden * 4).floor() / 4 + 0.125


def similarity(hidden, band):
    return triton_frame_similarity.run(hidden.to(DEVICE), band).cpu()


@some
@given(seed=seeds, shape=shapes, band=st.integers(1, 13), dtype=dtypes, layout=layouts)
def test_is_the_native_operator_and_the_mean_cosine(seed, shape, band, dtype, layout):
    hidden = video(seed, *shape, dtype)
    actual = triton_frame_similarity.run(laid_out(hidden.to(DEVICE), layout), band)
    assert actual.dtype == torch.float32 and actual.shape == (shape[0], band) and actual.is_contiguous()
    bound = rounding.triton_frame_similarity(hidden)
    assert_within(actual, ops.frame_similarity(hidden, band), bound + rounding.frame_similarity(hidden))
    assert_within(actual, torch.from_numpy(plain_python.banded(hidden.double().numpy(), band)), bound)


@pytest.mark.parametrize("frames, tokens, channels, band", [(37, 2, 72, 3), (70, 1, 40, 66)])
def test_pairs_of_different_tiles(frames, tokens, channels, band):
    check_long_sums(frames, tokens, channels, band)


@pytest.mark.parametrize(
    "most_groups, tokens", cases((8, 11), among=[(8, 11), (triton_frame_similarity._MOST_GROUPS, 515)])
)
def test_positions_of_one_program(most_groups, tokens, monkeypatch):
    monkeypatch.setattr(triton_frame_similarity, "_MOST_GROUPS", most_groups)
    check_long_sums(3, tokens, 24, 2)


def check_long_sums(frames, tokens, channels, band):
    hidden = video(4, frames, tokens, channels)
    bound = rounding.triton_frame_similarity(hidden, tokens_of_a_sum=2) + rounding.frame_similarity(hidden)
    assert_within(similarity(hidden, band), ops.frame_similarity(hidden, band), bound)


@pytest.mark.gpu(only=True)  # the interpreter takes minutes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frames", [8, 32, 64, 128])
def test_is_as_exact_for_the_shapes_of_real_encoders(frames, dtype):
    hidden = video(3, frames, 729, 1152, dtype).to(DEVICE)
    actual = triton_frame_similarity.run(hidden, frames - 1)
    bound = rounding.triton_frame_similarity(hidden, tokens_of_a_sum=8) + rounding.frame_similarity(hidden)
    assert_within(actual, declared._init_fn(hidden, frames - 1), bound)


@some
@given(seed=seeds, shape=shapes, counts=counts_lists, band=st.integers(1, 9), dtype=dtypes)
@example(seed=0, shape=(1, 1, 72), counts=[9, 31], band=30, dtype=torch.bfloat16)
@example(seed=0, shape=(1, 1, 72), counts=[30, 40], band=39, dtype=torch.float16)
def test_a_video_has_the_same_bits_alone_and_in_a_batch(seed, shape, counts, band, dtype):
    hidden = comparable(video(seed, sum(counts), *shape[1:], dtype))
    together = similarity(hidden, band)
    for rows in per_video(counts):
        alone = similarity(hidden[rows], band)
        inside = torch.arange(alone.shape[0])[:, None] > torch.arange(band)
        assert torch.equal(alone[inside], together[rows][inside])
        assert alone[~inside].eq(0).all()


@some
@given(seed=seeds, shape=shapes, dtype=dtypes, period=st.integers(1, 3), extra=st.integers(0, 3))
@example(seed=1, shape=(23, 2, 72), dtype=torch.float32, period=3, extra=0)
@example(seed=1, shape=(15, 2, 72), dtype=torch.bfloat16, period=3, extra=0)
def test_equal_frames_tie_bit_for_bit_at_every_distance(seed, shape, dtype, period, extra):
    frames, tokens, channels = shape
    hidden = comparable(video(seed, period, tokens, channels, dtype)).repeat(frames, 1, 1)
    actual = similarity(hidden, len(hidden) + extra)
    found = {}
    for t in range(len(hidden)):
        for j in range(t):
            kind = frozenset({t % period, (t - 1 - j) % period})
            assert actual[t, j] == found.setdefault(kind, 1.0 if len(kind) == 1 else actual[t, j])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frames", [4, 33])
def test_a_still_video_is_all_ones(frames, dtype):
    hidden = comparable(video(0, 1, 5, 384, dtype)).repeat(frames, 1, 1)
    assert similarity(hidden, 7)[torch.arange(frames)[:, None] > torch.arange(7)].eq(1).all()


@pytest.mark.parametrize("length", [1e-14, 1e-10, 1e10, 1e18])
def test_lengths_do_not_matter(length):
    hidden = video(6, 4, 3, 20)
    expected = similarity(hidden, 3)
    hidden[1] *= length
    bound = 2 * rounding.triton_frame_similarity(hidden)
    assert_within(similarity(hidden, 3), expected, bound)
    assert_within(similarity(length * video(6, 4, 3, 20), 3), expected, bound)


def test_zero_tokens_have_cosine_zero():
    hidden = torch.ones(3, 4, 2)
    hidden[:, 0] = 0
    hidden[2, 1] = 1e-16
    assert similarity(hidden, 2).tolist() == [[0, 0], [0.75, 0], [0.5, 0.5]]
    assert similarity(torch.zeros(3, 4, 2), 2).eq(0).all()


@pytest.mark.parametrize("frames", [5, 40])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_frame_that_cannot_be_compared_is_nan_and_no_other_is(frames, bad):
    hidden = video(1, frames, 3, 4)
    hidden[2, 1, 3] = bad
    hidden[1, 1] = 0
    touches = torch.zeros(frames, 4, dtype=torch.bool)
    touches[2, :2] = touches[3, 0] = touches[4, 1] = True
    if frames > 5:
        touches[5, 2] = touches[6, 3] = True
    assert torch.equal(similarity(hidden, 4).isnan(), touches)


def test_has_the_same_bits_in_many_runs():
    hidden = video(5, 34, 2, 72, torch.bfloat16)
    expected = similarity(hidden, 6)
    assert all(torch.equal(similarity(hidden, 6), expected) for _ in range(RUNS))


@pytest.mark.parametrize(
    "hidden, band, says",
    [
        (torch.ones(3, 4), 1, "3"),
        (torch.ones(3, 4, 5, dtype=torch.int64), 1, "int64"),
        (torch.ones(3, 0, 5), 1, r"\[3, 0, 5\]"),
        (torch.ones(0, 4, 5), 1, r"\[0, 4, 5\]"),
        (torch.ones(3, 4, 5), 0, "band=0"),
    ],
)
def test_refuses_what_means_nothing(hidden, band, says):
    with pytest.raises(ValueError, match=f"frame_similarity.*{says}"):
        similarity(hidden, band)


def test_is_the_provider_of_what_tensor_cores_and_float32_can_do():
    for dtype in DTYPES:
        assert provider_of("frame_similarity", "cuda", torch.ones(3, 4, 5, dtype=dtype), 2) == "triton"
    assert provider_of("frame_similarity", "cuda", torch.ones(3, 4, 5, dtype=torch.float64), 2) == "native"
    assert provider_of("frame_similarity", "cuda", torch.ones(3, 4), 2) == "native"
    assert provider_of("frame_similarity", "cpu", torch.ones(3, 4, 5), 2) == "native"


COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from earlytom_compile.kernels import triton_frame_similarity as module

def compiled(kernel, pointers, constants, options, name):
    kinds = {arg: "constexpr" if arg in constants else pointers.get(arg, "i32") for arg in kernel.arg_names}
    whole = ("frame_stride", "token_stride", "channels")  # 1152 channels: multiples of 16
    aligned = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(kinds) if arg in pointers or arg in whole}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    open(f"{sys.argv[1]}/{name}.cubin", "wb").write(binary.asm["cubin"])
    open(f"{sys.argv[1]}/{name}.ptx", "w").write(binary.asm["ptx"])

for dtype, name in ((torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")):
    for frames, band in ((32, 31), (64, 31), (64, 63), (128, 127)):
        constants = module.launch_options(dtype, frames, band)
        launch = {key: constants.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion")}
        pointers = {"hidden": "*" + name, "sums": "*fp32"}
        compiled(module._sum_cosines, pointers, constants, launch, f"{name}-{frames}-{band}")
constants = {"GROUPS": module._MOST_GROUPS, "BLOCK": module._MEAN_BLOCK}
compiled(module._mean, {"sums": "*fp32", "out": "*fp32"}, constants, {}, "mean")
"""


@pytest.mark.long
def test_compiles_for_hopper_without_spills_and_with_wide_loads(tmp_path):
    binaries = hopper.compiled(COMPILE, tmp_path)
    assert len(binaries) == 13
    multiplied = {}
    for binary in binaries:
        hopper.no_spills(binary)
        ptx = binary.with_suffix(".ptx").read_text()
        assert "cp.async.cg.shared.global" in ptx or binary.stem == "mean", binary.stem
        instructions = set(re.findall(r"(?:wgmma\.mma_async|mma\.sync)[.\w]+", ptx))
        alone = binary.stem.replace("-64-31", "-32-31").replace("-128-127", "-64-63")
        assert multiplied.setdefault(alone, instructions) == instructions, "a batch would be multiplied in another way"
