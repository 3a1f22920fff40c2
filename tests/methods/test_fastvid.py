from fractions import Fraction

import pytest
import torch
from effort import examples
from hypothesis import given
from method_videos import agrees, cases, plain, video
from plain_tokens import dealt, dot, fixed_point, highest, mean, peaks, proportional, signed_square

from earlytom_compile.methods.exact import fixed_point as integers_of
from earlytom_compile.methods.fastvid import _segments, keep


def segments_of(integers):
    """Borders below 0.9, and the seven lowest. Sums of integer tokens point where the frames' means do."""
    frames = [[sum(entries) for entries in zip(*frame, strict=True)] for frame in integers]
    like = {m: signed_square(frames[m], frames[m + 1]) for m in range(len(frames) - 1)}
    lowest = sorted(like, key=lambda m: (like[m], m))[:7]
    segments = [[0]]
    for m in like:
        if like[m] < Fraction("0.9") ** 2 or m in lowest:
            segments.append([])
        segments[-1].append(m + 1)
    return segments


def shares_of(frames, tokens, share):
    """{frame: salient tokens}, {frame: anchors}."""
    anchor_frames = frames[::4]
    room = [tokens // 2] * len(anchor_frames)
    anchors = dict(zip(anchor_frames, dealt(min(4 * share // 10, sum(room)), room), strict=True))
    left = share - sum(anchors.values())
    return dict(zip(frames, dealt(left, [tokens - anchors.get(f, 0) for f in frames]), strict=True)), anchors


def by_the_rules(tokens, importance, budget):
    """FastVID, segment by segment, as its paper and the docstring read."""
    places = range(len(tokens[0]))
    flat, unit = fixed_point([token for frame in tokens for token in frame])
    integers = [[flat[f * len(places) + p] for p in places] for f in range(len(tokens))]
    segments = segments_of(integers)
    out = {}
    shares = proportional(budget, [len(segment) * len(places) for segment in segments])
    for frames, share in zip(segments, shares, strict=True):
        salient, anchors = shares_of(frames, len(places), share)
        kept = {(f, p) for f in frames for p in highest(dict(enumerate(importance[f])), salient[f])}
        anchors_of = {}
        for f in anchors:
            rest = [p for p in places if (f, p) not in kept]
            chosen = peaks([integers[f][p] for p in rest], unit, anchors[f], 4) if anchors[f] else []
            anchors_of[f] = [(f, rest[i]) for i in sorted(chosen)]
        taken = kept | {place for anchors in anchors_of.values() for place in anchors}
        free = [(f, p) for f in frames for p in places if (f, p) not in taken]
        for anchors in anchors_of.values():
            belonging = {place: [] for place in anchors}
            for f, p in free if anchors else ():
                nearest = max(anchors, key=lambda a: (signed_square(tokens[f][p], tokens[a[0]][a[1]]), -a[1]))
                belonging[nearest].append(tokens[f][p])
            for place, others in belonging.items():
                anchor = tokens[place[0]][place[1]]
                others = mean(others) if others else anchor
                out[place] = [0.6 * a + 0.4 * b for a, b in zip(anchor, others, strict=True)]
        out |= {place: tokens[place[0]][place[1]] for place in kept}
    return out


@examples(500)
@given(case=cases(most_frames=14, most_tokens=8))
def test_segments_merges_and_keeps_by_the_rules(case):
    drawn, budget = case
    agrees(keep(drawn, budget), by_the_rules(*plain(drawn), budget), drawn)


@examples(50)
@given(case=cases(most_frames=30, most_tokens=6))
def test_segments_longer_than_the_distance_of_anchor_frames(case):
    """A slow drift: the only borders are the seven lowest cosines."""
    drawn, budget = case
    steps = torch.linspace(0, 1, len(drawn.features))[:, None, None] ** 3
    features = (drawn.features[:1].double() + 0.05 * steps * drawn.features[-1:].double()).to(drawn.features.dtype)
    drawn = drawn._replace(features=features)
    agrees(keep(drawn, budget), by_the_rules(*plain(drawn), budget), drawn)


def test_anchors_and_salient_tokens_are_two_to_three():
    one = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(0))
    noise = 0.02 * torch.randn(8, 20, 8, generator=torch.Generator().manual_seed(1))
    drawn = video(0, 8, 20, 8)._replace(features=one + noise)
    kept = keep(drawn, 40)  # eight segments of one frame, 5 tokens each, of which 2 are anchors
    chosen = torch.zeros(8, 20, dtype=torch.bool)
    chosen[tuple(kept.places.T)] = True
    assert chosen.sum(1).tolist() == [5] * 8
    unchanged = (kept.tokens == drawn.features[tuple(kept.places.T)]).all(1)
    assert unchanged.sum() == 8 * 3
    salient = drawn.importance.topk(3).indices
    assert chosen.gather(1, salient).all()


@pytest.mark.parametrize("lead", [0.4, 0.9])
def test_an_anchor_moves_two_fifths_of_the_way_to_those_it_stands_for(lead):
    """One frame, one salient token, one anchor: the densest of the three that are left, with the mean of the others."""
    features = torch.tensor([[[0.0, 8.0], [1.0, 0.0], [1.0 + lead, 0.0], [3.0, 0.0], [40.0, 1.0]]])
    importance = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.9]])
    kept = keep(video(0, 1, 5, 2)._replace(features=features, importance=importance), 3)
    assert kept.places.tolist() == [[0, 0], [0, 2], [0, 4]]
    torch.testing.assert_close(kept.tokens[1], torch.tensor([0.6 * (1 + lead) + 0.4 * 2.0, 0.0]))


def test_the_oracle_counts_as_a_reader_would():
    assert dot([1, 2], [3, 4]) == 11
    assert shares_of(list(range(6)), 10, 20) == ({0: 2, 1: 2, 2: 2, 3: 2, 4: 2, 5: 2}, {0: 4, 4: 4})


def test_frames_of_exactly_the_threshold_stay_together():
    """The cosine of the first two is 0.9, and of all others 0, which are the seven lowest."""
    frames = torch.zeros(9, 1, 5)
    frames[0, 0, 0] = 1
    frames[1, 0, :4] = torch.tensor([9.0, 3.0, 3.0, 1.0])
    frames[2::2, 0, 4] = 1
    frames[3::2, 0, 0] = 1
    assert _segments(integers_of(frames)[0]) == [(0, 1), *((frame, frame) for frame in range(2, 9))]
