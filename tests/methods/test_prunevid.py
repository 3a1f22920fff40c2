import math
from itertools import combinations

import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from method_videos import agrees, cases, plain, video
from plain_tokens import clusters, cosine, fixed_point, peaks, squared_distance, static_and_moving

from earlytom_compile.methods.prunevid import _border, _segments, keep


def segments_of(tokens):
    """Between each two neighbouring centers the border that costs least, of all there are."""
    frames, places = len(tokens), len(tokens[0])
    flat, unit = fixed_point([token for frame in tokens for token in frame])
    sums = [[sum(entries) for entries in zip(*flat[f * places : (f + 1) * places], strict=True)] for f in range(frames)]
    means, coarser = fixed_point(sums)
    centers = sorted(peaks(means, unit * coarser / places, max(1, frames // 4), 7))
    borders = []
    for before, after in zip(centers, centers[1:], strict=False):
        costs = {
            border: sum(
                squared_distance(means[f], means[before if f < border else after]) for f in range(before, after + 1)
            )
            for border in range(before + 1, after + 1)
        }
        borders.append(min(costs, key=lambda border: (costs[border], border)))
    return list(zip([0, *borders], [*(b - 1 for b in borders), frames - 1], strict=True))


def by_the_rules(tokens, budget):
    """PruneVid's first stage as its paper and the docstring read."""

    def static(segment, place):
        same_place = [tokens[f][place] for f in range(segment[0], segment[1] + 1)]
        like = [cosine(a, b) for a, b in combinations(same_place, 2)]
        return round(math.fsum(like) / len(like) * 2**30) >= round(0.8 * 2**30)

    def thin_moving(moving, number, merged, integers, unit):
        if not number:
            return {}
        of_group = [merged[place] for place in moving], [integers[place] for place in moving]
        return {moving[center]: token for center, token in clusters(*of_group, unit, number, 7).items()}

    return static_and_moving(tokens, segments_of(tokens), static, budget, thin_moving, neighbours=7)


@examples(500)
@given(case=cases(most_frames=14, most_tokens=9))
def test_merges_over_time_and_in_space_by_the_rules(case):
    drawn, budget = case
    agrees(keep(drawn, budget), by_the_rules(plain(drawn)[0], budget), drawn)


@examples(80)
@given(case=cases(most_frames=30, most_tokens=3))
def test_segments_are_a_quarter_of_the_frames_and_consecutive(case):
    drawn, _ = case
    segments = _segments(drawn.features)
    assert len(segments) == max(1, len(drawn.features) // 4)
    assert [f for begin, last in segments for f in range(begin, last + 1)] == list(range(len(drawn.features)))
    assert segments == segments_of(plain(drawn)[0])


@examples(30)
@given(lengths=st.lists(st.integers(2, 6), min_size=2, max_size=2).filter(lambda n: 8 <= sum(n) < 12))
def test_a_cut_is_a_border(lengths):
    scenes = torch.eye(6)[:2].repeat_interleave(torch.tensor(lengths), 0)
    features = scenes[:, None] + 0.01 * torch.randn(sum(lengths), 4, 6, generator=torch.Generator().manual_seed(7))
    assert _segments(features) == [(0, lengths[0] - 1), (lengths[0], sum(lengths) - 1)]


def test_static_places_are_kept_once_and_moving_ones_in_every_frame():
    still = torch.tensor([[8.0, 0.0, 0.0], [0.0, 8.0, 0.0]]).expand(4, 2, 3)
    moving = torch.tensor([[0.0, 0.0, 5.0], [0.0, -5.0, 0.0], [-5.0, 0.0, 0.0], [0.0, 0.0, -5.0]])[:, None]
    features = torch.cat([still, moving], 1)
    kept = keep(video(0, 4, 3, 3)._replace(features=features), 6)
    assert kept.places.tolist() == [[0, 0], [0, 1], [0, 2], [1, 2], [2, 2], [3, 2]]
    assert torch.equal(kept.tokens, features[tuple(kept.places.T)])


def test_a_mean_cosine_of_exactly_the_threshold_is_static():
    kept = keep(video(0, 2, 1, 2)._replace(features=torch.tensor([[[4.0, 3.0]], [[7.0, 0.0]]])), 1)
    assert kept.places.tolist() == [[0, 0]] and kept.tokens.tolist() == [[5.5, 1.5]]


def test_a_frame_halfway_between_two_centers_goes_to_the_later_one():
    halfway = [[0.0, 1.0, 4.0], [1.0, 0.0, 1.0], [4.0, 1.0, 0.0]]
    assert _border(halfway, 0, 2) == 1
