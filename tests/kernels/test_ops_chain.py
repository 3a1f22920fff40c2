"""All operators in the order the compressed model calls them, against ``reference.py`` video by video."""

import math

import pytest
import rounding
import torch
from effort import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from op_inputs import DTYPES, SEGMENT, dtypes, operator_settings, ops, per_video, plan_rows, seeds, variants, video
from rounding import assert_within

from earlytom_compile.reference import frame_similarity, plan_frame_merge, segment_frames, select_tokens

chain_options = st.fixed_dictionaries(
    {
        "variant": variants,
        "tau_seg": st.sampled_from([-1.0, 0.3, 0.6, 0.8]),
        "alpha": st.sampled_from([0.9, 0.5, 1.0]),
        "max_window": st.sampled_from([0, 2, 4, 8]),
    }
)
# Repeated frames tie exactly; frames of noise hardly ever come near a tie.
LEAST_MARGIN = 1e-5


def similarities_are_apart(hidden):
    """No two different similarities so close that float32 could order them either way."""
    similarity = ops.frame_similarity(hidden, max(1, len(hidden) - 1)).flatten().unique()
    gaps = similarity.diff()
    return not bool((gaps < LEAST_MARGIN).any())


def rounding_of_weights(hidden, weights):
    """Float64, as ``weights`` [T', T] of the reference: what comes of similarities that are off by ``error``.

    w = s / (s + s') moves by at most error (|s| + |s'|) / (s + s')^2, where s = w (s + s') and s' = (1 - w) (s + s'),
    and s is the similarity of the two frames; then a sum, a division and 1 - w are rounded on either side.
    """
    error = rounding.frame_similarity(hidden) + rounding.UNIT
    bound = torch.zeros(weights.shape, dtype=torch.float64)
    for row, weight in enumerate(weights.double()):
        frames = weight.nonzero().flatten().tolist()
        if len(frames) == 2:
            first, second = frames
            w, s = weight[first].abs(), frame_similarity(hidden[first], hidden[second]).double().abs()
            total = s / w
            bound[row, frames] = error * (w + weight[second].abs()) / total + 6 * rounding.UNIT * w.clamp(min=1)
    return bound


def rounding_of_merged(hidden, x, weights):
    """Float64 [T', ...], of frames ``x`` merged by ``weights``: two products and their sum on either side."""
    sizes = x.double().abs().flatten(1)
    merged = rounding_of_weights(hidden, weights) @ sizes + 2 * rounding.gamma(3) * weights.double().abs() @ sizes
    return merged.view(-1, *x.shape[1:])


def reference_options(options):
    """0 means no limit to the operators; to the reference that is a wide window."""
    return options | {"max_window": options["max_window"] or 10**6}


def merge_once(hidden, counts, options, tau_merge, min_frames):
    similarity = ops.frame_similarity(hidden, max(1, max(counts) - 1))
    return ops.plan_merge(similarity, torch.tensor(counts), **options, tau_merge=tau_merge, min_frames=min_frames)


@operator_settings
@given(
    seed=seeds,
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    size=st.tuples(st.integers(2, 5), st.integers(6, 12)),
    dtype=dtypes,
    options=chain_options,
    tau_merge=st.sampled_from([SEGMENT, 0.2, 0.77]),
    min_frames=st.integers(1, 6),
)
def test_a_plan_is_the_references_for_each_video(seed, counts, size, dtype, options, tau_merge, min_frames):
    hidden = video(seed, sum(counts), *size, dtype)
    assume(all(similarities_are_apart(hidden[rows]) for rows in per_video(counts)))
    source, weight, merged = merge_once(hidden, counts, options, tau_merge, min_frames)
    (out,) = ops.merge_frames([hidden], source, weight, int(merged.sum()))
    for rows, kept in zip(per_video(counts), per_video(merged.tolist()), strict=True):
        plan = plan_frame_merge(
            hidden[rows],
            **reference_options(options),
            tau_merge="segment" if math.isnan(tau_merge) else tau_merge,
            min_frames=min_frames,
        )
        actual = torch.zeros(kept.stop - kept.start, rows.stop - rows.start)
        for o, row in enumerate(plan_rows(source[kept], weight[kept], rows.start)):
            for frame, share in row.items():
                actual[o, frame] = share
        assert_within(actual, plan.weights, rounding_of_weights(hidden[rows], plan.weights))
        torch.testing.assert_close(out[kept], plan.apply(hidden[rows]))


@examples(60)
@given(
    seed=seeds,
    videos=st.integers(1, 3),
    frames=st.integers(1, 12),
    tokens=st.integers(1, 9),
    options=chain_options,
    retain_ratio=st.sampled_from([0.05, 0.1, 0.25, 0.5, 1.0]),
    layers=st.integers(1, 3),
)
def test_merges_and_selection_are_the_references_for_each_video(
    seed, videos, frames, tokens, options, retain_ratio, layers
):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.cat([video(seed + v, frames, tokens, 8) for v in range(videos)])
    importance = torch.rand(len(hidden), tokens, generator=generator)
    counts, min_frames = [frames] * videos, math.ceil(retain_ratio * frames)

    def alone():
        found = [(hidden[rows], importance[rows]) for rows in per_video(counts)]
        assume(all(similarities_are_apart(one) for one, _ in found))
        return found

    for _ in range(layers):
        before = alone()
        source, weight, merged = merge_once(hidden, counts, options, SEGMENT, min_frames)
        n, counts = int(merged.sum()), merged.tolist()
        hidden, importance = ops.merge_frames([hidden, importance], source, weight, n)
        for (one, scores), rows in zip(before, per_video(counts), strict=True):
            plan = plan_frame_merge(one, **reference_options(options), min_frames=min_frames)
            for x, actual in ((one, hidden[rows]), (scores, importance[rows])):
                assert_within(actual, plan.apply(x), rounding_of_merged(one, x, plan.weights))

    expected = alone()
    similarity = ops.frame_similarity(hidden, max(1, max(counts) - 1))
    dynamic = ops.dynamic_frames(similarity, torch.tensor(counts), **options)
    kept = select(hidden, importance, dynamic, counts, options["variant"], frames, retain_ratio)
    for (one, scores), actual in zip(expected, kept, strict=True):
        segments = segment_frames(one, **reference_options(options))
        wanted = select_tokens(
            scores, segments, frames_in=frames, retain_ratio=retain_ratio, variant=options["variant"]
        )
        assert torch.equal(actual, wanted)


def select(hidden, importance, dynamic, counts, variant, frames, retain_ratio):
    """(frame, token) of each video's kept tokens."""
    given_counts = torch.tensor(counts)
    if variant == "paper":
        budget = max(1, round(retain_ratio * frames * hidden.shape[1]))
        tokens, kept = ops.select_tokens(hidden, importance, dynamic, given_counts, budget)
        return list(kept)
    tokens, kept, kept_counts = ops.select_tokens_released(
        hidden, importance, dynamic, given_counts, frames, retain_ratio
    )
    return [kept[rows, 1:] for rows in per_video(kept_counts.tolist())]


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 8, 16])
def test_a_still_video_is_planned_as_the_reference_plans_it(frames, variant):
    hidden = video(0, 1, 7, 12).repeat(frames, 1, 1)
    options = {"variant": variant, "tau_seg": 0.6, "alpha": 0.9, "max_window": 8}
    _, _, merged = merge_once(hidden, [frames], options, SEGMENT, 1)
    assert merged.item() == len(plan_frame_merge(hidden, **options).weights)


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_video_of_one_frame_stays_as_it_is(dtype, tokens, variant):
    hidden, counts = video(1, 1, tokens, 3, dtype), torch.tensor([1])
    query, key = torch.randn(2, 1, 2, tokens, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    options = {"variant": variant, "tau_seg": 0.6, "alpha": 0.9, "max_window": 8}
    similarity = ops.frame_similarity(hidden, 7)
    assert similarity.tolist() == [[0.0] * 7]
    source, weight, merged = ops.plan_merge(similarity, counts, **options, tau_merge=SEGMENT, min_frames=1)
    assert (source.tolist(), weight.tolist(), merged.tolist()) == ([[0, 0]], [[1.0, 0.0]], [1])
    importance = ops.attention_received(query, key, 0.3)
    out, scores = ops.merge_frames([hidden, importance], source, weight, 1)
    assert torch.equal(out, hidden) and torch.equal(scores, importance)
    dynamic = ops.dynamic_frames(similarity, counts, **options)
    assert dynamic.tolist() == [True]
    for kept in select(out, scores, dynamic, [1], variant, 1, 1.0):
        assert kept.tolist() == [[0, token] for token in range(tokens)]
    (best,) = select(out, scores, dynamic, [1], variant, 1, 0.1)
    assert best.tolist() == [[0, int(scores.argmax())]]


def test_the_chain_gives_the_same_bits_every_time():
    hidden = video(4, 14, 9, 8)
    importance = torch.rand(14, 9)
    options = {"variant": "paper", "tau_seg": 0.3, "alpha": 0.9, "max_window": 0}

    def run():
        source, weight, merged = merge_once(hidden, [8, 6], options, SEGMENT, 2)
        n = int(merged.sum())
        out, scores = ops.merge_frames([hidden, importance], source, weight, n)
        dynamic = ops.dynamic_frames(ops.frame_similarity(out, 7), merged, **options)
        return source, weight, merged, out, *ops.select_tokens(out, scores, dynamic, merged, 11)

    first = run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
