"""``variant="released"``: each quirk of the authors' code by itself; the golden cases check them together."""

import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from video_strategies import importances, merge_options, partitions, smooth_videos, videos

from earlytom_compile.reference import frame_similarity, plan_frame_merge, segment_frames, select_tokens

some = examples(60)


def released(video, **options):
    return plan_frame_merge(video, variant="released", **{"tau_seg": -1.5, "max_window": 100, **options})


def directions(*angles):
    """One token a frame, at these angles: the similarity of two frames is the cosine of what lies between."""
    angles = torch.tensor(angles)
    return torch.stack([angles.cos(), angles.sin()], -1)[:, None]


def test_a_segment_is_compared_with_its_first_frame():
    slow = directions(0.0, 0.4, 0.8, 1.2, 1.6)  # neighbours alike (0.92), ends not
    options = {"tau_seg": 0.6, "alpha": 1.0}
    assert segment_frames(slow, variant="paper", **options).tolist() == [[0, 4]]
    assert segment_frames(slow, variant="released", **options).tolist() == [[0, 2], [3, 4]]


@pytest.mark.parametrize(("max_window", "longest"), [(None, 7), (8, 7), (3, 2), (2, 1), (1, 1)])
def test_a_window_of_m_makes_segments_of_m_minus_one_frames(max_window, longest):
    segments = segment_frames(torch.ones(20, 1, 2), variant="released", tau_seg=0.6, max_window=max_window)
    assert max((segments[:, 1] - segments[:, 0] + 1).tolist()) == longest


@some
@given(smooth_videos(min_frames=4), merge_options())
def test_the_last_of_two_or_more_middle_frames_never_contributes(video, options):
    plan = plan_frame_merge(video, variant="released", **options)
    for first, last in plan.segments.tolist():
        used = (plan.weights[:, first : last + 1] != 0).any(0).tolist()
        if last - first + 1 >= 4:
            assert not used[-2]
        else:
            assert all(used)
        assert used[0] and used[-1]


@some
@given(videos(), merge_options(), st.integers(1, 20))
def test_there_is_no_floor(video, options, min_frames):
    plans = [plan_frame_merge(video, variant="released", **{**options, "min_frames": n}) for n in (1, min_frames)]
    torch.testing.assert_close(plans[0].weights, plans[1].weights, atol=0, rtol=0, equal_nan=True)


def test_ties_do_not_merge_so_a_static_video_only_loses_the_last_middle_frame():
    assert torch.equal(released(torch.ones(8, 2, 3)).weights, torch.eye(8)[[0, 1, 2, 3, 4, 5, 7]])


def test_the_last_pair_merges_with_weights_one_and_zero_whatever_follows():
    weights = released(directions(0.0, 0.1, 0.2, 1.0)).weights
    assert weights.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    unlike = released(directions(0.0, 1.0, 3.0, 3.1)).weights  # -0.42 is still above s(head, tail) = -1
    assert torch.equal(unlike, weights)


def test_a_negative_next_similarity_gives_weights_outside_zero_one():
    video = directions(0.0, 2.0, 2.5, 4.5, 0.9, 1.57)
    s_i, s_next = frame_similarity(video[1], video[2]), frame_similarity(video[2], video[3])
    assert s_next < 0 < s_i
    row = released(video).weights[1]
    assert row[1] > 1 and row[2] < 0
    torch.testing.assert_close(row[1:3], torch.stack([s_i, s_next]) / (s_i + s_next))


def test_a_next_similarity_of_exactly_zero_gives_all_weight_to_the_first():
    basis = torch.eye(4)
    video = torch.stack([basis[3], basis[0], basis[0] + basis[1], basis[2], basis[0] - basis[3]])[:, None]
    assert released(video).weights[1].tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("frames", [1, 2, 3])
@some
@given(data=st.data())
def test_up_to_three_frames_nothing_happens(frames, data):
    video = data.draw(videos(min_frames=3))[:frames]
    assert torch.equal(released(video).weights, torch.eye(frames))


@some
@given(st.data(), st.integers(1, 12), st.floats(0.01, 1.0))
def test_every_dynamic_and_every_static_frame_keeps_the_same_number(data, frames, retain_ratio):
    importance, segments = data.draw(importances(frames)), data.draw(partitions(frames))
    frames_in = frames + data.draw(st.integers(0, 12))
    kept = select_tokens(importance, segments, frames_in=frames_in, retain_ratio=retain_ratio, variant="released")
    dynamic = {t for segment in segments for t in segment}
    counts = torch.bincount(kept[:, 0], minlength=frames).tolist()
    of_dynamic = {counts[t] for t in range(frames) if t in dynamic}
    of_static = {counts[t] for t in range(frames) if t not in dynamic}
    assert len(of_dynamic) == 1 and len(of_static) <= 1
    assert 1 <= max(of_static, default=1) <= max(of_dynamic) <= importance.shape[1]
    assert kept.tolist() == sorted(kept.tolist())


@pytest.mark.parametrize(
    ("tokens", "retain_ratio", "frames_in", "of_dynamic", "of_static"),
    [
        (10, 0.25, 4, 3, 2),  # 2.5: ceil, and round half to even
        (10, 0.35, 4, 4, 4),  # 3.5
        (10, 0.01, 4, 1, 1),  # 0.1: a static frame keeps one all the same
        (10, 0.5, 16, 10, 10),  # 16 frames became 4: 0.5 * 4 is capped at 1
    ],
)
def test_the_budget_of_a_frame(tokens, retain_ratio, frames_in, of_dynamic, of_static):
    kept = select_tokens(
        torch.rand(4, tokens), [[0, 3]], frames_in=frames_in, retain_ratio=retain_ratio, variant="released"
    )
    assert torch.bincount(kept[:, 0]).tolist() == [of_dynamic, of_static, of_static, of_dynamic]
