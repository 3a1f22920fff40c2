"""Stage 1 of ``variant="paper"``: every rule of segmentation and frame merging, as a property."""

import brute_force
import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from video_strategies import merge_options, segment_options, smooth_videos, videos

from earlytom_compile.errors import EarlyTomConfigError
from earlytom_compile.reference import frame_similarity, plan_frame_merge, segment_frames

some = examples(40)
UNIT = 2.0**-24
"""The relative error of one rounding to float32."""
WEIGHT = 5 * UNIT
"""Of a weight: two similarities, exact and then rounded, their sum, a division, and 1 minus it; none is above 1."""
ONE_SEGMENT = {"variant": "paper", "tau_seg": -1.5}


def segments_of(video, **options):
    return segment_frames(video, variant="paper", **options).tolist()


def plan_of(video, **options):
    return plan_frame_merge(video, variant="paper", **options)


def supports(plan):
    """The frames with weight in each row."""
    return [row.nonzero().flatten().tolist() for row in plan.weights]


# --- Similarity -----------------------------------------------------------------------------------


@some
@given(videos(min_frames=2))
def test_similarity_is_the_mean_cosine_symmetric_and_within_one(video):
    a, b = video[0], video[1]
    s = frame_similarity(a, b)
    assert s.dtype == torch.float32 and s.shape == ()
    assert s.item() == brute_force.similarity(a.tolist(), b.tolist())
    assert torch.equal(s, frame_similarity(b, a))
    assert -1.000001 <= s <= 1.000001


@some
@given(smooth_videos(), st.sampled_from([2.0**-20, 0.1, 7.0, 2.0**20]))
def test_equal_frames_are_exactly_similar_at_any_scale(video, scale):
    frame = scale * video[0]
    assert frame_similarity(frame, frame.clone()) == 1


def test_similarity_with_a_zero_token_is_zero_there():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert frame_similarity(a, b) == 0.5
    assert frame_similarity(torch.zeros(2, 2), torch.zeros(2, 2)) == 0


# --- Segments (Eq. 1) -----------------------------------------------------------------------------


@some
@given(videos(), segment_options())
def test_segments_are_those_of_brute_force(video, options):
    expected = brute_force.segments(video.tolist(), **options)
    assert segments_of(video, **options) == [[s[0], s[-1]] for s in expected]


@some
@given(videos(), segment_options(), st.sampled_from(["paper", "released"]))
def test_segments_partition_the_frames(video, options, variant):
    segments = segment_frames(video, variant=variant, **options)
    assert segments.dtype == torch.int64
    covered = [t for first, last in segments.tolist() for t in range(first, last + 1)]
    assert covered == list(range(len(video)))


@some
@given(videos(), segment_options())
def test_no_segment_is_longer_than_max_window(video, options):
    longest = max(last - first + 1 for first, last in segments_of(video, **options))
    assert longest <= (options["max_window"] or len(video))
    default = {**options, "max_window": None}
    assert segments_of(video, **default) == segments_of(video, **{**options, "max_window": len(video)})


def test_no_segment_is_longer_than_128_frames_unless_asked_for():
    still = torch.ones(300, 1, 2)
    assert segments_of(still, tau_seg=0.6) == [[0, 127], [128, 255], [256, 299]]
    assert segments_of(still, tau_seg=0.6, max_window=300) == [[0, 299]]


@some
@given(videos(), segment_options())
def test_a_threshold_out_of_reach_makes_every_frame_or_the_whole_video_a_segment(video, options):
    assert len(segments_of(video, **{**options, "tau_seg": 1.1, "alpha": 1.0})) == len(video)
    assert len(segments_of(video, **{**options, "tau_seg": -1.5, "max_window": None})) == 1


@some
@given(videos(), segment_options())
def test_later_frames_do_not_move_earlier_cuts(video, options):
    whole = segments_of(video, **options)
    for frames in range(1, len(video)):
        seen = [[first, min(last, frames - 1)] for first, last in whole if first < frames]
        assert segments_of(video[:frames], **options) == seen


@some
@given(videos(), st.floats(-1, 1), st.floats(-1, 1))
def test_without_smoothing_a_higher_threshold_only_adds_cuts(video, one, other):
    low, high = sorted((one, other))
    cuts_low = {first for first, _ in segments_of(video, tau_seg=low, alpha=1.0)}
    assert cuts_low <= {first for first, _ in segments_of(video, tau_seg=high, alpha=1.0)}


def test_the_running_average_follows_eq_1():
    video = torch.eye(3)[[0, 1, 1, 2]][:, None]  # s = 0, 1, 0
    assert segments_of(video, tau_seg=0.6, alpha=0.5) == [[0, 0], [1, 2], [3, 3]], "0.5 | 1, 0.5 |"
    assert segments_of(video, tau_seg=0.5, alpha=0.5) == [[0, 2], [3, 3]], "0.5 is not below 0.5; 0.75, 0.375 |"


def test_the_running_average_starts_at_one_again_after_a_cut():
    angles = torch.tensor([0.0, 1.5, 2.4])  # s = 0.07, 0.62
    video = torch.stack([angles.cos(), angles.sin()], -1)[:, None]
    assert segments_of(video, tau_seg=0.6, alpha=0.5) == [[0, 0], [1, 2]], "0.54 | 0.81, where 0.58 would cut"


# --- Merging (Eq. 2 and 3) ------------------------------------------------------------------------


@some
@given(videos(), merge_options())
def test_the_plan_is_that_of_brute_force(video, options):
    plan = plan_of(video, **options)
    groups = brute_force.merge_groups(video.tolist(), **options)
    expected = torch.zeros(len(groups), len(video))
    for o, group in enumerate(groups):
        for t, weight in group.items():
            expected[o, t] = weight
    torch.testing.assert_close(plan.weights, expected, atol=WEIGHT, rtol=0)


@some
@given(videos(), merge_options())
def test_weights_lie_in_zero_one_and_every_row_sums_to_one(video, options):
    weights = plan_of(video, **options).weights
    assert weights.dtype == torch.float32
    assert (weights >= 0).all() and (weights <= 1).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)), atol=2 * UNIT, rtol=0)  # 1 - w, and the sum


@some
@given(videos(), merge_options())
def test_no_frame_is_lost(video, options):
    """With similarities above 0 (none below counts as weight) every frame has weight in exactly one row."""
    weights = plan_of(video.abs() + 0.01, **options).weights
    assert ((weights > 0).sum(0) == 1).all()


@some
@given(videos(), merge_options())
def test_rows_are_single_frames_or_neighbours_in_time_order(video, options):
    rows = supports(plan_of(video, **options))
    assert all(len(row) == 1 or row[1] == row[0] + 1 for row in rows)
    assert [row[0] for row in rows] == sorted({row[0] for row in rows})
    assert len(rows) >= (len(video) + 1) // 2


@some
@given(videos(), merge_options())
def test_head_and_tail_never_merge_and_nothing_merges_across_segments(video, options):
    plan = plan_of(video, **options)
    for first, last in plan.segments.tolist():
        for end in (first, last):
            assert plan.weights[:, end].tolist().count(1.0) == 1
            assert plan.weights[plan.weights[:, end] == 1].count_nonzero() == 1
    of_frame = [n for n, (first, last) in enumerate(plan.segments.tolist()) for _ in range(first, last + 1)]
    assert all(len({of_frame[t] for t in row}) == 1 for row in supports(plan))


@some
@given(videos(), merge_options())
def test_the_segments_of_a_plan_are_those_of_segment_frames(video, options):
    only = {name: options[name] for name in ("tau_seg", "alpha", "max_window")}
    assert plan_of(video, **options).segments.tolist() == segments_of(video, **only)


@pytest.mark.parametrize("frames", [1, 2, 3])
@some
@given(data=st.data())
def test_up_to_three_frames_nothing_can_merge(frames, data):
    video = data.draw(videos(min_frames=3))[:frames]
    assert torch.equal(plan_of(video, **data.draw(merge_options())).weights, torch.eye(frames))


@some
@given(videos())
def test_a_static_video_merges_most(video):
    """floor((T - 2) / 2) pairs fit between head and tail, and exact ties let all of them merge."""
    frames = len(video)
    fewest = frames - max(0, (frames - 2) // 2)
    static = video[:1].expand(frames, -1, -1)
    assert len(plan_of(static, tau_seg=-1.5).weights) == fewest
    assert len(plan_of(video, tau_seg=-1.5).weights) >= fewest
    for row in plan_of(static, tau_seg=-1.5).weights:
        assert row.max() in (0.5, 1.0)


def test_ties_merge_and_the_first_pair_wins():
    video = torch.ones(6, 2, 3)
    assert supports(plan_of(video, tau_seg=0.6)) == [[0], [1, 2], [3, 4], [5]]
    assert supports(plan_of(video[:5], tau_seg=0.6)) == [[0], [1, 2], [3], [4]]
    assert supports(plan_of(video, tau_seg=0.6, tau_merge=1.0)) == [[0], [1, 2], [3, 4], [5]]


def test_the_last_pair_is_compared_with_the_tail():
    angles = torch.tensor([0.0, 0.1, 0.5, 0.6])  # s(1, 2) < s(2, 3)
    video = torch.stack([angles.cos(), angles.sin()], -1)[:, None]
    assert len(plan_of(video, tau_seg=0.0).weights) == 4
    angles = torch.tensor([0.0, 0.1, 0.3, 0.8])  # s(1, 2) > s(2, 3)
    video = torch.stack([angles.cos(), angles.sin()], -1)[:, None]
    weights = plan_of(video, tau_seg=0.0).weights
    s_i, s_next = torch.tensor(0.2).cos(), torch.tensor(0.5).cos()
    torch.testing.assert_close(weights[1, 1:3], torch.stack([s_i, s_next]) / (s_i + s_next))


def test_a_negative_similarity_weighs_nothing_and_two_of_them_weigh_the_same():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    opposite = torch.stack([a, a, a, -a])[:, None]  # s_i = 1, s_{i+1} = -1
    assert plan_of(opposite, tau_seg=-1.5, tau_merge=-1.0).weights[1].tolist() == [0, 1, 0, 0]
    mostly = torch.stack([a, a, (a + 3 * b) / 10**0.5, -a - b])[:, None]  # their sum is below 0
    assert plan_of(mostly, tau_seg=-1.5, tau_merge=-1.0).weights[1].tolist() == [0, 1, 0, 0]
    orthogonal = torch.eye(4)[:, None]  # both 0
    assert plan_of(orthogonal, tau_seg=-1.5).weights[1].tolist() == [0, 0.5, 0.5, 0]


@some
@given(videos(), merge_options())
def test_a_merging_threshold_out_of_reach_merges_nothing(video, options):
    assert torch.equal(plan_of(video, **{**options, "tau_merge": 1.1}).weights, torch.eye(len(video)))


# --- Floor ----------------------------------------------------------------------------------------


@some
@given(videos(), merge_options(), st.integers(1, 20))
def test_the_floor_undoes_just_enough_merges(video, options, min_frames):
    free = len(plan_of(video, **{**options, "min_frames": 1}).weights)
    floored = len(plan_of(video, **{**options, "min_frames": min_frames}).weights)
    assert floored == max(free, min(len(video), min_frames))


@some
@given(videos(), merge_options())
def test_the_floor_undoes_the_least_similar_merges_and_of_ties_the_later(video, options):
    def merges(plan):
        """(similarity, -first frame) of each merge: the order in which merges survive."""
        firsts = [t for t in range(len(video)) if not (plan.weights[:, t] == 1).any()]
        pairs = [t for t in firsts if any(r == [t, t + 1] for r in supports(plan))]
        return {(frame_similarity(video[t], video[t + 1]).item(), -t) for t in pairs}

    video = video.abs() + 0.01  # positive weights, so that supports show every merge
    free = merges(plan_of(video, **{**options, "min_frames": 1}))
    kept = merges(plan_of(video, **options))
    assert kept <= free
    assert all(survivor > undone for survivor in kept for undone in free - kept)


@some
@given(videos(), merge_options())
def test_repeated_merging_never_goes_below_the_floor(video, options):
    floor = min(len(video), options["min_frames"])
    for _ in range(3):
        video = plan_of(video, **options).apply(video)
        assert len(video) >= floor


# --- What must not matter -------------------------------------------------------------------------


@some
@given(videos(), merge_options(), st.randoms(use_true_random=False))
def test_the_order_of_channels_and_of_tokens_does_not_matter(video, options, random):
    plan = plan_of(video, **options)
    for dim in (1, 2):
        order = list(range(video.shape[dim]))
        random.shuffle(order)
        shuffled = plan_of(video.index_select(dim, torch.tensor(order)), **options)
        assert torch.equal(shuffled.segments, plan.segments)
        torch.testing.assert_close(shuffled.weights, plan.weights, atol=2 * WEIGHT, rtol=0)


@some
@given(videos(), merge_options(), st.sampled_from([2.0**-10, 2.0, 1024.0]))
def test_scale_and_memory_layout_do_not_matter(video, options, scale):
    plan = plan_of(video, **options)
    transposed = video.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for same in (scale * video, transposed, video.clone().requires_grad_()):
        assert torch.equal(plan_of(same, **options).weights, plan.weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@some
@given(video=videos(), options=merge_options())
def test_the_dtype_of_the_features_matters_only_by_their_values(dtype, video, options):
    rounded = video.to(dtype)
    plan = plan_of(rounded, **options)
    assert torch.equal(plan.weights, plan_of(rounded.float(), **options).weights) or dtype == torch.float64
    merged = plan.apply(rounded)
    assert merged.dtype == dtype
    torch.testing.assert_close(merged, plan.apply(rounded.double()).to(dtype))


# --- Applying a plan ------------------------------------------------------------------------------


@some
@given(videos(), merge_options())
def test_applying_a_plan_is_its_weight_matrix(video, options):
    plan = plan_of(video, **options)
    torch.testing.assert_close(plan.apply(video), torch.einsum("ot,tsd->osd", plan.weights, video))
    assert torch.equal(plan.apply(torch.eye(len(video))), plan.weights)
    assert plan.apply(torch.zeros(len(video))).shape == (len(plan.weights),)


@some
@given(videos(), merge_options())
def test_untouched_frames_are_exact_copies(video, options):
    plan = plan_of(video, **options)
    merged = plan.apply(video)
    for o, row in enumerate(plan.weights):
        if row.max() == 1:
            assert torch.equal(merged[o], video[row.argmax()])


@some
@given(videos(), merge_options())
def test_a_merged_value_lies_between_its_sources(video, options):
    plan = plan_of(video, **options)
    for row, merged in zip(plan.weights, plan.apply(video), strict=True):
        sources = video[row > 0]
        rounding = 5 * UNIT * sources.abs().amax(0)  # 1 - w and its sum with w, two products and a sum
        assert (merged >= sources.amin(0) - rounding).all() and (merged <= sources.amax(0) + rounding).all()


def test_what_a_plan_cannot_merge_is_an_error():
    plan = plan_of(torch.ones(6, 1, 2), tau_seg=0.6)
    with pytest.raises(EarlyTomConfigError, match=r"\(5, 2\).*6 frames"):
        plan.apply(torch.ones(5, 2))
    with pytest.raises(EarlyTomConfigError, match="int64.*floating"):
        plan.apply(torch.arange(6))


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "papers"}, "'papers'.*'paper', 'released'"),
        ({"tau_seg": float("nan")}, "tau_seg=nan"),
        ({"tau_seg": "0.6"}, "tau_seg='0.6'"),
        ({"alpha": 1.5}, "alpha=1.5.*0 to 1"),
        ({"max_window": 0}, "max_window=0.*at least 1"),
        ({"max_window": 2.5}, "max_window=2.5"),
        ({"tau_merge": "frame"}, "tau_merge='frame'.*'segment'"),
        ({"tau_merge": float("nan")}, "tau_merge=nan"),
        ({"min_frames": 0}, "min_frames=0.*at least 1"),
        ({"min_frames": True}, "min_frames=True"),
        ({"hidden": torch.ones(4, 2)}, r"\(4, 2\).*frames, tokens, channels"),
        ({"hidden": torch.ones(0, 2, 2)}, "none of them 0"),
        ({"hidden": torch.ones(4, 2, 2, dtype=torch.int64)}, "int64"),
        ({"hidden": torch.full((4, 2, 2), float("nan"))}, "NaN"),
        ({"hidden": torch.full((4, 2, 2), float("inf"))}, "inf"),
    ],
)
def test_bad_input_is_named(options, message):
    given_options = {"variant": "paper", "tau_seg": 0.6, **options}
    hidden = given_options.pop("hidden", torch.ones(4, 2, 2))
    with pytest.raises(EarlyTomConfigError, match=message):
        plan_frame_merge(hidden, **given_options)
