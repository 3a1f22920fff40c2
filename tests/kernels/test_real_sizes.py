"""The Triton providers at the sizes of SigLIP-so400m with 32 frames, where only a GPU is fast enough."""

import pytest
import rounding
import torch
from op_inputs import DTYPES, SEGMENT, active_places, clip, ops, sources, video
from rounding import assert_within

from earlytom_compile.kernels.attention_received import attention_received
from earlytom_compile.kernels.frame_similarity import frame_similarity
from earlytom_compile.kernels.merge_frames import merge_frames
from earlytom_compile.kernels.pack_places import pack_places, return_places, spread_places, take_places
from earlytom_compile.kernels.plan_reuse import plan_reuse
from earlytom_compile.kernels.providers import provider_of
from earlytom_compile.kernels.reuse_attention import reuse_attention
from earlytom_compile.kernels.select_tokens import select_tokens

pytestmark = pytest.mark.gpu(only=True)

FRAMES, TOKENS, CHANNELS, HEADS, HEAD_DIM = 32, 729, 1152, 16, 72
POOLED, WIDTH = 196, 3584  # of the tokens that are selected from
OPTIONS = {"variant": "paper", "tau_seg": 0.6, "alpha": 0.9, "max_window": 0}
of_all_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def computed(op, *inputs, **options):
    """What the operator gives on the GPU, by Triton, which must be the same bits in 20 runs, and by its native body."""
    name = op._qualname.removeprefix("earlytom::")
    assert provider_of(name, "cuda", *inputs, **options) == "triton"
    run = getattr(ops, name)
    first = _all(run(*inputs, **options))
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, _all(run(*inputs, **options)), strict=True))
    return first, _all(op._init_fn(*inputs, **options))


def _all(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def frames_of_a_video(dtype):
    return video(11, FRAMES, TOKENS, CHANNELS, dtype).cuda()


@of_all_dtypes
def test_frame_similarity(dtype):
    (actual,), (expected,) = computed(frame_similarity, frames_of_a_video(dtype), FRAMES - 1)
    hidden = frames_of_a_video(dtype)
    # 729 tokens in at most 512 groups: 2 in a sum.
    assert_within(actual, expected, rounding.triton_frame_similarity(hidden, 2) + rounding.frame_similarity(hidden))


@of_all_dtypes
def test_merge_frames(dtype):
    hidden = frames_of_a_video(dtype)
    similarity, counts = ops.frame_similarity(hidden, FRAMES - 1), torch.tensor([FRAMES], device="cuda")
    source, weight, merged = ops.plan_merge(similarity, counts, **OPTIONS, tau_merge=SEGMENT, min_frames=4)
    n = int(merged.sum())
    assert 4 <= n < FRAMES, "nothing merged, the test would compare copies"
    importance = torch.rand(FRAMES, TOKENS, device="cuda")
    actual, expected = computed(merge_frames, [hidden, importance], source, weight, n)
    for x, one, other in zip([hidden, importance], actual, expected, strict=True):
        assert_within(one, other, 2 * rounding.merge_frames(x, source, weight, n))
    copies = weight[:n, 0] == 1
    assert copies.any() and torch.equal(actual[0][copies], hidden[source[:n, 0][copies]])


@of_all_dtypes
def test_attention_received(dtype):
    """Queries and keys as an encoder has them: heads split from one projection."""
    projected = torch.randn(2, FRAMES, TOKENS, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(3))
    query, key = (2 * projected).to("cuda", dtype).transpose(2, 3)
    (actual,), (expected,) = computed(attention_received, query, key, HEAD_DIM**-0.5)
    scale, unit = HEAD_DIM**-0.5, rounding.unit_of_products(dtype)
    for frame in range(FRAMES):  # the bound takes gigabytes of float64 for all of them
        q, k = query[frame : frame + 1], key[frame : frame + 1]
        own = rounding.attention_received(q, k, scale, unit, scores_twice=True)
        assert_within(actual[frame], expected[frame], (own + rounding.attention_received(q, k, scale))[0])
        assert_within(actual[frame].double().sum(), torch.tensor(1.0), own.sum())


@of_all_dtypes
@pytest.mark.parametrize("levels", [5, 1000])
def test_select_tokens(dtype, levels):
    generator = torch.Generator().manual_seed(levels)
    features = torch.randn(FRAMES, POOLED, WIDTH, generator=generator).to("cuda", dtype)
    importance = (torch.randint(levels, (FRAMES, POOLED), generator=generator) / levels).cuda()
    dynamic = (torch.rand(FRAMES, generator=generator) < 0.5).cuda()
    counts = torch.tensor([FRAMES], device="cuda")
    actual, expected = computed(select_tokens, features, importance, dynamic, counts, FRAMES * POOLED // 10)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@of_all_dtypes
def test_select_tokens_of_frames_as_the_encoder_has_them(dtype):
    """Before pooling: 729 tokens a frame."""
    hidden = frames_of_a_video(dtype)
    importance = torch.rand(FRAMES, TOKENS, generator=torch.Generator().manual_seed(5)).cuda()
    dynamic = torch.arange(FRAMES, device="cuda") % 3 == 0
    counts = torch.tensor([FRAMES], device="cuda")
    actual, expected = computed(select_tokens, hidden, importance, dynamic, counts, FRAMES * TOKENS // 10)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@of_all_dtypes
@pytest.mark.parametrize("prefix, budget", [(0, 0), (1, 0), (0, 7000), (1, 7000)])
def test_plan_reuse(dtype, prefix, budget):
    """Two videos: differences are summed in float64, and come to the same whatever the order."""
    pixels = torch.stack([clip(v, FRAMES, 3, 384, 384) for v in range(2)]).to("cuda", dtype)
    actual, expected = computed(plan_reuse, pixels, [27, 27], [14, 14], prefix, 0.03, budget)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@of_all_dtypes
def test_what_lies_around_the_layers_that_reuse(dtype):
    source = sources(1, 2, FRAMES // 2, TOKENS).cuda()
    actual, expected = computed(pack_places, source, active_places(source))
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    index, rows, _ = expected
    hidden = frames_of_a_video(dtype)
    (before,), (expected,) = computed(take_places, hidden, index)
    assert torch.equal(before, expected)
    packed = before + torch.randn_like(before)
    (actual,), (expected,) = computed(return_places, hidden, packed, index, rows)
    assert torch.equal(actual, expected)
    heads = packed.unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2)
    (actual,), (expected,) = computed(spread_places, heads, rows)
    assert torch.equal(actual, expected)


@of_all_dtypes
def test_reuse_attention(dtype):
    """Queries, keys and values as an encoder has them: heads split from one projection."""
    source = sources(2, 1, FRAMES, TOKENS).cuda()
    _, rows, offsets = ops.pack_places(source, active_places(source))
    total = int(offsets[-1])
    projected = torch.randn(3, 1, total, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(3))
    query, key, value = (2 * projected).to("cuda", dtype).transpose(2, 3)
    scale, unit = HEAD_DIM**-0.5, rounding.unit_of_products(dtype)
    (actual,), (expected,) = computed(reuse_attention, query, key, value, rows, offsets, scale)
    borders = offsets.tolist()
    for frame, (start, stop) in enumerate(zip(borders, borders[1:], strict=False)):
        own = (query[0, :, start:stop], key[0][:, rows[frame]], value[0][:, rows[frame]])
        if start < stop:  # both on the GPU, where the native body multiplies on tensor cores as well
            bound = 2 * rounding.attention(*own, scale, unit)
            assert_within(actual[0, :, start:stop], expected[0, :, start:stop], bound)
