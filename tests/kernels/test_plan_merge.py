import math

import numpy as np
import plain_python
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import SEGMENT, counts_lists, operator_settings, ops, per_video, plan_rows, symmetric, variants

# Multiples of 1/16 are exact in every arithmetic, and coarse enough that ties are common.
sixteenths = st.integers(-16, 16).map(lambda value: value / 16)


@st.composite
def similarities(draw, counts):
    """float32 [T, T]: entries that reach into the video before are NaN, since nothing may read them."""
    total = sum(counts)
    values = draw(st.sampled_from([sixteenths, st.sampled_from([0.5, 0.75])]))
    out = torch.full((total, total), math.nan)
    for rows in per_video(counts):
        for t in range(rows.start, rows.stop):
            for j in range(total):
                if t - 1 - j >= rows.start:
                    out[t, j] = draw(values)
                elif t - 1 - j < 0:
                    out[t, j] = 0
    return out


@st.composite
def problems(draw):
    counts = draw(counts_lists)
    options = {
        "variant": draw(variants),
        "tau_seg": draw(sixteenths),
        "alpha": draw(st.sampled_from([1.0, 0.9, 0.5])),
        "max_window": draw(st.integers(0, 7)),
    }
    return draw(similarities(counts)), counts, options


def plans(similarity, counts, options):
    source, weight, merged = ops.plan_merge(similarity, torch.tensor(counts), **options)
    total = int(merged.sum())
    assert source[total:].eq(0).all() and weight[total:].eq(0).all()
    return [
        plan_rows(source[out], weight[out], rows.start)
        for rows, out in zip(per_video(counts), per_video(merged.tolist()), strict=True)
    ]


@operator_settings
@given(problem=problems(), tau_merge=st.one_of(st.just(SEGMENT), sixteenths), min_frames=st.integers(1, 9))
def test_is_the_plan_of_the_rules_read_literally(problem, tau_merge, min_frames):
    similarity, counts, options = problem
    options |= {"tau_merge": tau_merge, "min_frames": min_frames}
    for rows, actual in zip(per_video(counts), plans(similarity, counts, options), strict=True):
        expected = plain_python.plan_merge(symmetric(similarity[rows]).numpy(), **options)
        assert [list(row) for row in actual] == [list(row) for row in expected]
        for a, b in zip(actual, expected, strict=True):
            # Both are quotients in float64, of which the operator's is rounded to float32.
            np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=torch.finfo(torch.float32).eps)


@operator_settings
@given(problem=problems())
def test_dynamic_frames_are_heads_and_tails(problem):
    similarity, counts, options = problem
    dynamic = ops.dynamic_frames(similarity, torch.tensor(counts), **options)
    assert dynamic.dtype == torch.bool
    for rows in per_video(counts):
        cut = plain_python.segments(symmetric(similarity[rows]).numpy(), **options)
        ends = {frame for segment in cut for frame in segment}
        assert dynamic[rows].tolist() == [frame in ends for frame in range(rows.stop - rows.start)]


@operator_settings
@given(problem=problems())
def test_a_video_is_planned_alone_as_in_a_batch(problem):
    similarity, counts, options = problem
    merge = {"tau_merge": SEGMENT, "min_frames": 2}
    together = plans(similarity, counts, options | merge)
    dynamic = ops.dynamic_frames(similarity, torch.tensor(counts), **options)
    for rows, plan in zip(per_video(counts), together, strict=True):
        frames = [rows.stop - rows.start]
        assert plans(similarity[rows], frames, options | merge) == [plan]
        assert torch.equal(ops.dynamic_frames(similarity[rows], torch.tensor(frames), **options), dynamic[rows])


@operator_settings
@given(problem=problems(), min_frames=st.integers(1, 9))
def test_paper_loses_no_frame_keeps_the_floor_and_weighs_within_one(problem, min_frames):
    similarity, counts, options = problem
    options |= {"variant": "paper", "tau_merge": SEGMENT, "min_frames": min_frames}
    for count, plan in zip(counts, plans(similarity, counts, options), strict=True):
        assert sorted(frame for row in plan for frame in row) == list(range(count))
        assert len(plan) >= min(min_frames, count)
        for row in plan:
            assert all(0 <= weight <= 1 for weight in row.values())
            assert sum(row.values()) == pytest.approx(1, abs=torch.finfo(torch.float32).eps)  # two roundings


@pytest.mark.parametrize("frames, left", [(1, 1), (2, 2), (3, 3), (4, 3), (5, 4), (6, 4), (16, 9)])
def test_a_still_video_merges_most(frames, left):
    source, weight, merged = ops.plan_merge(
        torch.ones(frames, frames),
        torch.tensor([frames]),
        variant="paper",
        tau_seg=0.6,
        alpha=0.9,
        max_window=0,
        tau_merge=SEGMENT,
        min_frames=1,
    )
    assert merged.tolist() == [left]
    pairs = source[weight[:, 1] > 0]
    assert pairs.tolist() == [[i, i + 1] for i in range(1, frames - 2, 2)]


@pytest.mark.parametrize("frames, left", [(1, 1), (2, 2), (3, 3), (4, 3), (5, 4), (16, 15)])
def test_released_merges_nothing_of_a_still_video_and_drops_its_last_middle_frame(frames, left):
    source, weight, merged = ops.plan_merge(
        torch.ones(frames, frames),
        torch.tensor([frames]),
        variant="released",
        tau_seg=0.6,
        alpha=0.9,
        max_window=0,
        tau_merge=SEGMENT,
        min_frames=1,
    )
    assert merged.tolist() == [left] and weight[:, 1].eq(0).all()
    assert source[:left, 0].tolist() == [t for t in range(frames) if left == frames or t != frames - 2]


@pytest.mark.parametrize("min_frames, left", [(1, 5), (5, 5), (6, 6), (7, 7), (8, 8), (99, 8)])
def test_the_floor_undoes_the_least_similar_merges_and_of_equals_the_later(min_frames, left):
    similarity = torch.zeros(8, 7)
    similarity[:, 0] = torch.tensor([0, 0.5, 0.75, 0.5, 0.875, 0.5, 0.75, 0.5])
    source, weight, merged = ops.plan_merge(
        similarity,
        torch.tensor([8]),
        variant="paper",
        tau_seg=-1.0,
        alpha=1.0,
        max_window=0,
        tau_merge=0.6,
        min_frames=min_frames,
    )
    assert merged.tolist() == [left]
    pairs = source[:left][source[:left, 0] != source[:left, 1]].tolist()
    assert sorted(pairs) == sorted([[3, 4], [1, 2], [5, 6]][: 8 - left])


@pytest.mark.parametrize("alike, following, threshold", [(0.75, 0.5, 0.75), (0.75, 0.75, 0.5)])
def test_exact_ties_merge_in_paper_and_not_in_released(alike, following, threshold):
    similarity = torch.full((5, 4), -1.0)
    similarity[2, 0], similarity[3, 0], similarity[4, 3] = alike, following, threshold
    pairs = {}
    for variant in ("paper", "released"):
        chosen = options(variant=variant, tau_seg=-2.0)
        source, weight, _ = ops.plan_merge(similarity, torch.tensor([5]), **chosen)
        pairs[variant] = source[weight[:, 1] > 0].tolist()
    assert pairs == {"paper": [[1, 2]], "released": []}


def test_the_weights_of_a_pair_follow_equation_3():
    def weights(variant, alike, following):
        similarity = torch.full((5, 4), -1.0)
        similarity[2, 0], similarity[3, 0] = alike, following
        _, weight, merged = ops.plan_merge(
            similarity,
            torch.tensor([5]),
            variant=variant,
            tau_seg=-2.0,
            alpha=1.0,
            max_window=0,
            tau_merge=-1.0,
            min_frames=1,
        )
        assert merged.item() == (4 if variant == "paper" else 3)
        return weight[1].tolist()

    assert weights("paper", 0.75, 0.25) == [0.75, 0.25]
    assert weights("paper", 0.75, -0.25) == [1.0, 0.0]
    assert weights("paper", 0.25, -0.75) == [1.0, 0.0]
    assert weights("paper", -0.25, -0.5) == [0.5, 0.5]
    assert weights("released", 0.75, -0.25) == [1.5, -0.5]
    assert weights("released", 0.75, 0.0) == [1.0, 0.0]
    assert weights("released", 0.5, -0.5) == [0.5, 0.5]


def options(**changes):
    return {
        "variant": "paper",
        "tau_seg": 0.5,
        "alpha": 0.9,
        "max_window": 0,
        "tau_merge": SEGMENT,
        "min_frames": 1,
    } | changes


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_refuses_similarities_that_are_not_numbers(variant, bad):
    similarity = torch.full((6, 5), 0.75)
    similarity[4] = bad
    for op, rest in ((ops.plan_merge, {}), (ops.dynamic_frames, {"tau_merge": None, "min_frames": None})):
        chosen = {k: v for k, v in options(variant=variant).items() if k not in rest}
        with pytest.raises(ValueError, match="similarity of frames 4 and [03] is (nan|inf).*hold NaN"):
            op(similarity, torch.tensor([6]), **chosen)


@pytest.mark.parametrize(
    "similarity, counts, changes, says",
    [
        (torch.ones(4, 3), [3], {}, r"counts=\[3\] over 4 frames"),
        (torch.ones(4, 3), [4, 0], {}, r"counts=\[4, 0\]"),
        (torch.ones(4, 3), [5, -1], {}, r"counts=\[5, -1\]"),
        (torch.ones(4, 3).double(), [4], {}, "float64"),
        (torch.ones(4), [4], {}, "1 axes"),
        (torch.ones(4, 2), [4], {}, "band of 2 frames, these options need 3"),
        (torch.ones(9, 1), [9], {"max_window": 3}, "band of 1 frames, these options need 2"),
        (torch.ones(9, 5), [9], {"variant": "released", "max_window": 8}, "band of 5.*need 6"),
        (torch.ones(4, 3), [4], {"variant": "papers"}, "variant='papers'; use one of 'paper', 'released'"),
        (torch.ones(4, 3), [4], {"tau_seg": math.nan}, "tau_seg=nan"),
        (torch.ones(4, 3), [4], {"alpha": 1.5}, "alpha=1.5"),
        (torch.ones(4, 3), [4], {"max_window": -1}, "max_window=-1"),
    ],
)
def test_refuses_what_means_nothing(similarity, counts, changes, says):
    with pytest.raises(ValueError, match=f"plan_merge.*{says}"):
        ops.plan_merge(similarity, torch.tensor(counts), **options(**changes))


def test_a_band_as_wide_as_the_longest_segment_is_enough():
    wide = torch.full((20, 19), 0.9)
    counts = torch.tensor([12, 8])
    for variant, max_window, band in (("paper", 5, 4), ("released", 8, 6), ("paper", 0, 11)):
        chosen = options(variant=variant, max_window=max_window)
        narrow = ops.plan_merge(wide[:, :band].contiguous(), counts, **chosen)
        for a, b in zip(narrow, ops.plan_merge(wide, counts, **chosen), strict=True):
            assert torch.equal(a, b)
    ops.plan_merge(wide[:, :1].contiguous(), counts, **options(tau_merge=0.5))
