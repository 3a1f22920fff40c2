"""Stage 2 of ``variant="paper"``: every rule of token selection, as a property."""

import math

import brute_force
import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from video_strategies import importances, partitions

from earlytom_compile.errors import EarlyTomConfigError
from earlytom_compile.reference import select_tokens

some = examples(60)


@st.composite
def selections(draw):
    """Arguments of select_tokens that fit together: N is at least the floor ceil(r * B)."""
    frames_in = draw(st.integers(1, 16))
    retain_ratio = draw(st.one_of(st.sampled_from([0.05, 0.1, 0.15, 0.2, 0.25, 0.5, 1.0]), st.floats(0.01, 1.0)))
    frames = draw(st.integers(math.ceil(retain_ratio * frames_in), frames_in))
    return {
        "importance": draw(importances(frames)),
        "segments": torch.tensor(draw(partitions(frames))),
        "frames_in": frames_in,
        "retain_ratio": retain_ratio,
    }


def select(arguments, **changes):
    return select_tokens(variant="paper", **{**arguments, **changes}).tolist()


def dynamic_frames(arguments):
    return {t for segment in arguments["segments"].tolist() for t in segment}


def by_frame(kept, frames):
    return [[token for frame, token in kept if frame == t] for t in range(frames)]


@some
@given(selections())
def test_the_selection_is_that_of_brute_force(arguments):
    expected = brute_force.select(
        arguments["importance"].tolist(),
        arguments["segments"].tolist(),
        arguments["frames_in"],
        arguments["retain_ratio"],
    )
    assert select(arguments) == expected


@some
@given(selections(), st.data())
def test_exactly_k_tokens_whatever_the_content(arguments, data):
    frames, tokens = arguments["importance"].shape
    budget = max(1, round(arguments["retain_ratio"] * arguments["frames_in"] * tokens))
    assert len(select(arguments)) == budget
    other_segments = torch.tensor(data.draw(partitions(frames)))
    other_scores = torch.rand(frames, tokens)
    assert len(select(arguments, segments=other_segments, importance=other_scores)) == budget


@some
@given(selections())
def test_tokens_are_distinct_and_in_time_and_raster_order(arguments):
    kept = select(arguments)
    assert kept == sorted(kept)
    assert len({tuple(row) for row in kept}) == len(kept)
    frames, tokens = arguments["importance"].shape
    assert all(0 <= frame < frames and 0 <= token < tokens for frame, token in kept)


@some
@given(selections())
def test_frames_share_evenly_and_dynamic_ones_get_the_spare_tokens_first(arguments):
    frames = len(arguments["importance"])
    counts = [len(tokens) for tokens in by_frame(select(arguments), frames)]
    base, spare = divmod(sum(counts), frames)
    assert set(counts) <= {base, base + 1}
    dynamic = dynamic_frames(arguments)
    order = sorted(dynamic) + [t for t in range(frames) if t not in dynamic]
    assert [counts[t] for t in order] == [base + 1] * spare + [base] * (frames - spare)


@some
@given(selections())
def test_a_dynamic_frame_keeps_its_most_important_tokens_of_ties_the_lower(arguments):
    frames = by_frame(select(arguments), len(arguments["importance"]))
    for t in dynamic_frames(arguments):
        rank = {j: (-score, j) for j, score in enumerate(arguments["importance"][t].tolist())}
        dropped = [rank[j] for j in rank if j not in frames[t]]
        assert all(rank[j] < worse for j in frames[t] for worse in dropped)


@some
@given(selections())
def test_a_static_frame_keeps_the_best_of_each_near_equal_run(arguments):
    tokens = arguments["importance"].shape[1]
    frames = by_frame(select(arguments), len(arguments["importance"]))
    for t, kept in enumerate(frames):
        if t in dynamic_frames(arguments) or not kept:
            continue
        sizes = [len(run) for run in torch.tensor_split(torch.arange(tokens), len(kept))]
        assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
        for token, run in zip(kept, torch.tensor_split(torch.arange(tokens), len(kept)), strict=True):
            scores = arguments["importance"][t][run].tolist()
            assert token == run[scores.index(max(scores))]


@some
@given(selections(), st.floats(0.01, 1.0))
def test_a_larger_budget_keeps_what_a_smaller_one_kept_in_dynamic_frames(arguments, retain_ratio):
    dynamic = dynamic_frames(arguments)
    smaller = {tuple(row) for row in select(arguments, retain_ratio=min(retain_ratio, arguments["retain_ratio"]))}
    larger = {tuple(row) for row in select(arguments)}
    assert {row for row in smaller if row[0] in dynamic} <= larger


@some
@given(selections())
def test_only_the_order_of_importance_matters(arguments):
    kept = select(arguments)
    assert select(arguments, importance=4 * arguments["importance"]) == kept
    assert select(arguments, importance=arguments["importance"].double()) == kept


@some
@given(selections())
def test_another_frame_s_importance_does_not_matter(arguments):
    changed = arguments["importance"].clone()
    changed[-1] = torch.rand(changed.shape[1])
    last = len(changed) - 1
    assert [r for r in select(arguments) if r[0] != last] == [
        r for r in select(arguments, importance=changed) if r[0] != last
    ]


@pytest.mark.parametrize("variant", ["paper", "released"])
@some
@given(data=st.data())
def test_everything_stays_at_ratio_one_without_merging(variant, data):
    frames = data.draw(st.integers(1, 8))
    importance = data.draw(importances(frames))
    kept = select_tokens(importance, data.draw(partitions(frames)), frames_in=frames, retain_ratio=1.0, variant=variant)
    assert kept.tolist() == [[t, j] for t in range(frames) for j in range(importance.shape[1])]


@some
@given(st.integers(1, 128), st.integers(1, 256), st.floats(1e-4, 1.0))
def test_the_floor_of_stage_1_always_leaves_enough_tokens(frames_in, tokens, retain_ratio):
    frames = math.ceil(retain_ratio * frames_in)
    assert max(1, round(retain_ratio * frames_in * tokens)) <= frames * tokens


def test_a_budget_below_one_token_a_frame_goes_to_dynamic_frames_first():
    scores = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    arguments = {"importance": scores, "segments": [[0, 2], [3, 3]], "frames_in": 4}
    assert select(arguments, retain_ratio=0.375) == [[0, 1], [2, 1], [3, 0]]
    assert select(arguments, retain_ratio=0.01) == [[0, 1]]


def test_half_a_token_rounds_to_even():
    arguments = {"importance": torch.rand(5, 5), "segments": [[0, 4]], "frames_in": 5}
    assert len(select(arguments, retain_ratio=0.5)) == 12
    assert len(select(arguments, retain_ratio=0.1)) == 2


def test_more_tokens_than_there_are_is_an_error_that_says_so():
    with pytest.raises(EarlyTomConfigError, match="asks for 30.*have only 20.*retain_ratio"):
        select_tokens(torch.rand(2, 10), [[0, 1]], frames_in=6, retain_ratio=0.5, variant="paper")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "Paper"}, "'Paper'"),
        ({"importance": torch.rand(4)}, r"\(4,\).*frames, tokens"),
        ({"importance": torch.ones(4, 3, dtype=torch.int64)}, "int64"),
        ({"importance": torch.full((4, 3), float("nan"))}, "NaN"),
        ({"segments": [[0, 1]]}, "0 to 3"),
        ({"segments": [[0, 2], [2, 3]]}, "follow one another"),
        ({"segments": [[0, 4]]}, "0 to 3"),
        ({"segments": [[0, 3], [4, 3]]}, "segments"),
        ({"segments": torch.zeros(0, 2)}, "segments"),
        ({"frames_in": 0}, "frames_in=0"),
        ({"retain_ratio": 0}, r"retain_ratio=0.*\(0, 1\]"),
        ({"retain_ratio": 1.01}, "retain_ratio=1.01"),
        ({"retain_ratio": float("nan")}, "retain_ratio=nan"),
    ],
)
def test_bad_input_is_named(changes, message):
    arguments = {
        "importance": torch.rand(4, 3),
        "segments": [[0, 3]],
        "frames_in": 4,
        "retain_ratio": 0.5,
        "variant": "paper",
        **changes,
    }
    with pytest.raises(EarlyTomConfigError, match=message):
        select_tokens(**arguments)
