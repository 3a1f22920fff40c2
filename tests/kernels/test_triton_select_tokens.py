"""The Triton providers of select_tokens and select_tokens_released: the native choice, bit for bit, and ptxas."""

import pytest
import test_ops_golden
import torch
from effort import cases, examples
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import DEVICE, DTYPES, RUNS, counts_lists, dtypes, laid_out, layouts, ops, per_video, seeds

triton = pytest.importorskip("triton")
import hopper  # noqa: E402

from earlytom_compile.kernels import triton_select_tokens, triton_select_tokens_released  # noqa: E402
from earlytom_compile.kernels.providers import provider_of  # noqa: E402

pytestmark = pytest.mark.gpu

interpreter_settings = examples(8)
FEATURES = [*DTYPES, torch.float64, torch.int64, torch.uint8, torch.bool]


def select_tokens(*arguments):
    return on_device(triton_select_tokens.run, arguments)


def select_tokens_released(*arguments):
    return on_device(triton_select_tokens_released.run, arguments)


def on_device(run, arguments):
    moved = [argument.to(DEVICE) if isinstance(argument, torch.Tensor) else argument for argument in arguments]
    return tuple(out.cpu() for out in run(*moved))


def selection(seed, counts, per_frame, channels, levels=3, features=torch.float32, importance=torch.float32):
    """features, importance (ties for few levels, zeros of both signs), dynamic, counts."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts)
    values = torch.randn(total, per_frame, channels, generator=generator).mul(9).abs().to(features)
    scores = torch.randint(-levels, levels + 1, (total, per_frame), generator=generator) / levels
    scores *= torch.where(torch.rand(scores.shape, generator=generator) < 0.5, -1.0, 1.0)
    dynamic = torch.rand(total, generator=generator) < 0.5
    return values, scores.to(importance), dynamic, torch.tensor(counts)


@st.composite
def selections(draw):
    levels = draw(st.sampled_from([1, 3, 1000]))
    per_frame, channels = draw(st.integers(1, 20)), draw(st.sampled_from([1, 3, 8]))
    kinds = draw(st.sampled_from(FEATURES)), draw(dtypes)
    values, scores, dynamic, counts = selection(draw(seeds), draw(counts_lists), per_frame, channels, levels, *kinds)
    return laid_out(values, draw(layouts)), laid_out(scores, draw(layouts)), dynamic, counts


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and one.is_contiguous() and torch.equal(one, other)


@interpreter_settings
@given(inputs=selections(), share=st.floats(0, 1))
def test_paper_is_the_native_selection_bit_for_bit(inputs, share):
    budget = max(1, int(share * inputs[3].min() * inputs[0].shape[1]))
    assert_same(select_tokens(*inputs, budget), ops.select_tokens(*inputs, budget))


@interpreter_settings
@given(inputs=selections(), merged=st.integers(0, 9), ratio=st.floats(0.01, 1))
def test_released_is_the_native_selection_bit_for_bit(inputs, merged, ratio):
    options = int(inputs[3].max()) + merged, ratio
    assert_same(select_tokens_released(*inputs, *options), ops.select_tokens_released(*inputs, *options))


BEYOND_ONE_BLOCK = [(3, 196, 530, 300), (1, 729, 5, 700), (3, 1, 1, 3), (1, 256, 2, 2), (1, 1024, 2, 2)]


@pytest.mark.parametrize(
    "frames, per_frame, channels, budget",
    cases((3, 196, 530, 300), (3, 1, 1, 3), (1, 256, 2, 2), among=BEYOND_ONE_BLOCK),
)
def test_frames_and_channels_beyond_one_block(frames, per_frame, channels, budget):
    inputs = selection(budget, [frames], per_frame, channels, 50)
    assert_same(select_tokens(*inputs, budget), ops.select_tokens(*inputs, budget))
    assert_same(select_tokens_released(*inputs, 4, 0.15), ops.select_tokens_released(*inputs, 4, 0.15))


@pytest.mark.parametrize("budget", [3, 8, 10, 14, 21])
def test_the_quota_of_a_long_video_counts_all_of_its_flags(budget, monkeypatch):
    monkeypatch.setattr(triton_select_tokens, "_FLAGS", 4)
    values, scores, _, counts = selection(4, [11], 2, 1)
    dynamic = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1, 0, 1, 1]).bool()
    inputs = values, scores, dynamic, counts, budget
    assert_same(select_tokens(*inputs), ops.select_tokens(*inputs))


@pytest.mark.parametrize("importance", DTYPES)
def test_infinite_importance_is_the_most_or_the_least(importance):
    values, scores, dynamic, counts = selection(5, [4], 11, 2, importance=importance)
    scores[:, 3:6] = torch.inf
    scores[:, 7:9] = -torch.inf
    for budget in (7, 25, 40):
        inputs = values, scores, dynamic, counts, budget
        assert_same(select_tokens(*inputs), ops.select_tokens(*inputs))


def test_copies_the_bits_of_nan():
    values, scores, dynamic, counts = selection(6, [2], 4, 3)
    values.view(torch.int32).copy_(torch.arange(24).view(values.shape) + 0x7FA00000)
    tokens, _ = select_tokens(values, scores, dynamic, counts, 8)
    assert torch.equal(tokens.view(torch.int32), values.view(torch.int32).view(1, 8, 3))


def test_has_the_same_bits_in_many_runs_and_in_any_company():
    inputs = selection(7, [2, 1], 9, 4)
    first, released = select_tokens(*inputs, 7), select_tokens_released(*inputs, 4, 0.4)
    for _ in range(RUNS):
        assert_same(select_tokens(*inputs, 7), first)
        assert_same(select_tokens_released(*inputs, 4, 0.4), released)
    values, scores, dynamic, counts = inputs
    apart = values, scores, torch.stack([dynamic, ~dynamic], 1)[:, 0], torch.stack([counts, -counts], 1)[:, 0]
    assert_same(select_tokens(*apart, 7), first)
    assert_same(select_tokens_released(*apart, 4, 0.4), released)
    for video, rows in enumerate(per_video([2, 1])):
        one = [part[rows] for part in inputs[:3]] + [inputs[3][video : video + 1]]
        assert_same(select_tokens(*one, 7), [part[video : video + 1] for part in first])


def guarded(monkeypatch):
    """Every new tensor lies between rows of a pattern; returns a check that the pattern is whole."""
    regions = []
    new_empty = torch.Tensor.new_empty

    def surrounded(tensor, size, **options):
        if size == 0:  # the interpreter's own
            return new_empty(tensor, size, **options)
        numel = torch.Size(size).numel()
        # A multiple of the widest load, so that alignment is as usual.
        wide = new_empty(tensor, (numel + 128,), **options).fill_(77)
        regions.append((wide, numel))
        return wide[64 : 64 + numel].view(size)

    monkeypatch.setattr(torch.Tensor, "new_empty", surrounded)

    def check():
        assert len(regions) == 2
        for wide, numel in regions:
            assert wide[:64].eq(77).all() and wide[64 + numel :].eq(77).all()

    return check


@pytest.mark.parametrize(
    "counts",
    [[3, 2], [4, 3], [7, -1], [0, 6], [6, 0], [2**32 + 3, 3], [2**62, 2**62], [-(2**63), 6], [1, 1, 1], [-1, 3, 4]],
)
def test_counts_that_mean_nothing_stay_in_bounds_and_keep_nothing(counts, monkeypatch):
    values, scores, dynamic, _ = selection(8, [6], 5, 3)
    check = guarded(monkeypatch)
    tokens, kept = select_tokens(values, scores, dynamic, torch.tensor(counts), 7)
    check()
    assert kept.shape == (len(counts), 7, 2) and kept.eq(-1).all() and tokens.eq(0).all()


def test_rows_without_a_token_are_marked(monkeypatch):
    values, scores, dynamic, counts = selection(9, [1, 3], 4, 3)
    expected = ops.select_tokens(values[1:], scores[1:], dynamic[1:], counts[1:], 6)
    check = guarded(monkeypatch)
    tokens, kept = select_tokens(values, scores, dynamic, counts, 6)
    check()
    assert kept[0].tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [-1, -1], [-1, -1]]
    assert torch.equal(tokens[0, :4], values[0]) and not tokens[0, 4:].any()
    assert_same((tokens[1:], kept[1:]), expected)


def test_nan_is_the_least_importance():
    values, scores, dynamic, counts = selection(10, [4], 9, 2)
    scores[0], scores[1, ::2], scores[3, 4] = torch.nan, torch.nan, -torch.nan
    known = torch.where(scores.isnan(), -torch.inf, scores)
    for budget in (4, 17, 36):
        expected = ops.select_tokens(values, known, dynamic, counts, budget)
        assert_same(select_tokens(values, scores, dynamic, counts, budget), expected)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({1: torch.rand(4, 2)}, r"importance \[4, 2\]"),
        ({1: torch.ones(4, 3, dtype=torch.int64)}, "int64"),
        ({2: torch.ones(3, dtype=torch.bool)}, r"dynamic \[3\]"),
        ({2: torch.ones(4)}, "float32"),
        ({0: torch.randn(4, 3)}, "2 axes"),
        ({0: torch.randn(4, 0, 2), 1: torch.rand(4, 0)}, "at least one token"),
    ],
)
def test_refuses_shapes_the_native_operator_refuses(changes, says):
    inputs = selection(11, [3, 1], 3, 2)
    inputs = [changes.get(place, part) for place, part in enumerate(inputs)]
    with pytest.raises(ValueError, match=f"select_tokens:.*{says}"):
        select_tokens(*inputs, 1)
    with pytest.raises(ValueError, match=f"select_tokens_released:.*{says}"):
        select_tokens_released(*inputs, 4, 0.5)


@pytest.mark.parametrize("budget", [0, -1, 13])
def test_refuses_a_budget_that_no_counts_can_fill(budget):
    with pytest.raises(ValueError, match=f"budget={budget}, but a video has 4 frames of 3 tokens"):
        select_tokens(*selection(12, [4], 3, 2), budget)
    values, scores, dynamic, _ = selection(12, [4], 3, 2)
    with pytest.raises(ValueError, match="a video has 0 frames"):
        select_tokens(values, scores, dynamic, torch.zeros(0, dtype=torch.int64), 1)


def test_released_reads_once_and_refuses_values_as_the_native_operator_does():
    values, scores, dynamic, counts = selection(13, [4], 3, 2)
    with pytest.raises(ValueError, match=r"counts=\[3\] over 4 frames"):
        select_tokens_released(values, scores, dynamic, counts - 1, 4, 0.5)
    with pytest.raises(ValueError, match="NaN"):
        select_tokens_released(values, scores * torch.nan, dynamic, counts, 4, 0.5)
    with pytest.raises(ValueError, match="retain_ratio"):
        select_tokens_released(values, scores, dynamic, counts, 4, 1.5)


def test_provider_needs_kinds_and_sizes_it_knows():
    def provider(features=torch.bfloat16, importance=torch.float32, per_frame=196):
        values = torch.ones(4, per_frame, 2, dtype=features, device="meta")
        scores = torch.ones(4, per_frame, dtype=importance, device="meta")
        rest = (torch.ones(4, dtype=torch.bool, device="meta"), torch.ones(1, dtype=torch.int64, device="meta"))
        chosen = provider_of("select_tokens", "cuda", values, scores, *rest, 3)
        assert chosen == provider_of("select_tokens_released", "cuda", values, scores, *rest, 4, 0.1)
        assert provider_of("select_tokens", "cpu", values, scores, *rest, 3) == "native"
        return chosen

    assert provider() == provider(features=torch.float64) == provider(per_frame=1024) == "triton"
    assert provider(importance=torch.float64) == provider(per_frame=1025) == "native"
    assert provider(features=torch.complex128) == "native"


class Providers:
    """The operator of the golden stage 2 as Triton computes it."""

    select_tokens_released = staticmethod(select_tokens_released)


@test_ops_golden.golden("stage2", quick_every=4)
def test_golden_selection(scalars, tensors, monkeypatch):
    monkeypatch.setattr(test_ops_golden, "ops", Providers)
    test_ops_golden.test_selection(scalars, tensors)


COMPILE = """
import itertools, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from earlytom_compile.kernels import triton_select_tokens, triton_select_tokens_released

ALIGNED = ("channels", "frame_stride", "token_stride")
TYPES = {"kept": "*i64", "dynamic": "*i1", "counts": "*i64", "table": "*i64"}

def compile_into(path, kernel, features, importance, constants):
    options = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    types = TYPES | {"features": features, "tokens": features, "importance": importance}
    kinds = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(kinds.items()) if kind[0] == "*" or name in ALIGNED
    }
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
    asm = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm
    open(path + ".cubin", "wb").write(asm["cubin"])
    open(path + ".ptx", "w").write(asm["ptx"])

dtypes = [("*i16", "*bf16"), ("*i16", "*fp16"), ("*i32", "*fp32")]
for (features, importance), per_frame in itertools.product(dtypes, (196, 729)):
    unit = {"channel_stride": 1, "column_stride": 1}
    for name, kernel, more in (
        ("paper", triton_select_tokens._select, {"VIDEOS": 4, "FLAGS": triton_select_tokens._FLAGS, "ONLY_DYNAMIC": 0}),
        ("released", triton_select_tokens_released._select_given, {}),
    ):
        constants = triton_select_tokens.frame_options(per_frame, 3584) | unit | more
        path = f"{sys.argv[1]}/{name}-{importance[1:]}-{per_frame}"
        compile_into(path, kernel, features, importance, constants)
"""


@pytest.mark.long
def test_compiles_for_hopper_without_spills_and_copies_16_bytes_at_a_time(tmp_path):
    binaries = hopper.compiled(COMPILE, tmp_path)
    assert len(binaries) == 12
    for binary in binaries:
        hopper.no_spills(binary)
        ptx = binary.with_suffix(".ptx").read_text()
        assert "ld.global.v4" in ptx and "st.global.v4" in ptx, binary.stem
