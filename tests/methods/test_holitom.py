from itertools import combinations

import torch
from effort import examples
from hypothesis import given
from method_videos import agrees, cases, plain, video
from plain_tokens import above, highest, static_and_moving

from earlytom_compile.methods.holitom import keep


def all_segmentations(frames):
    for number in range(frames):
        for borders in combinations(range(1, frames), number):
            yield list(zip([0, *borders], [*(b - 1 for b in borders), frames - 1], strict=True))


def by_the_rules(tokens, importance, budget):
    """HoliTom's stages before the language model, of all segmentations the best one."""
    places = range(len(tokens[0]))
    like = [
        [above(after[p], before[p], "0.8") for p in places] for before, after in zip(tokens, tokens[1:], strict=False)
    ]

    def static(segment, place):
        return all(like[m][place] for m in range(*segment))

    def gain(segments):
        return sum((s[1] - s[0]) * sum(static(s, p) for p in places) for s in segments)

    best = max(all_segmentations(len(tokens)), key=lambda s: (gain(s), [begin for begin, _ in reversed(s)]))

    def thin_moving(moving, number, tokens, integers, unit):
        taken = highest({place: importance[place[0]][place[1]] for place in moving}, number)
        return {place: tokens[place] for place in taken}

    return static_and_moving(tokens, best, static, budget, thin_moving, neighbours=7)


@examples(500)
@given(case=cases(most_frames=7, most_tokens=9))
def test_merges_over_time_and_in_space_by_the_rules(case):
    drawn, budget = case
    agrees(keep(drawn, budget), by_the_rules(*plain(drawn), budget), drawn)


def test_a_still_video_is_one_frame_of_clusters():
    one = video(0, 1, 12, 6).features
    drawn = video(0, 8, 12, 6)._replace(features=one.expand(8, 12, 6))
    kept = keep(drawn, 12)
    assert kept.places.tolist() == [[0, place] for place in range(12)]
    assert torch.equal(kept.tokens, one[0])


def test_the_whole_video_is_weighed_against_its_parts():
    """Two segments of two frames save 3 tokens each; one of four frames, in which place 0 repeats, would save 3."""
    cut = torch.eye(12)[torch.arange(12)].view(4, 3, 4, 3).permute(0, 1, 3, 2).reshape(4, 3, 12)
    features = torch.stack([cut[0], cut[0], cut[1], cut[1]])
    features[2:, 0] = features[0, 0]  # place 0 is the same in all frames
    kept = keep(video(0, 4, 3, 12)._replace(features=features), 6)
    assert kept.places.tolist() == [[frame, place] for frame in (0, 2) for place in range(3)]


def test_attention_chooses_among_tokens_that_change():
    features = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(3))
    importance = torch.zeros(4, 5)
    importance[torch.arange(4), torch.tensor([4, 0, 2, 1])] = 1.0
    drawn = video(0, 4, 5, 8)._replace(features=features, importance=importance)
    kept = keep(drawn, 4)
    assert kept.places.tolist() == [[0, 4], [1, 0], [2, 2], [3, 1]]
    assert torch.equal(kept.tokens, features[tuple(kept.places.T)])


def test_a_cosine_of_exactly_the_threshold_does_not_repeat():
    features = torch.tensor([[[4.0, 3.0]], [[7.0, 0.0]]])
    kept = keep(video(0, 2, 1, 2)._replace(features=features), 1)
    assert kept.places.tolist() == [[0, 0]] and torch.equal(kept.tokens, features[0])  # and not their mean
