import pytest
import torch
from effort import examples
from hypothesis import given
from method_videos import agrees, cases, plain, video
from plain_tokens import dealt, signed_square

from earlytom_compile.methods.dycoke import keep


def by_the_rules(tokens, budget):
    """{(frame, place): token}: DyCoke's first stage as its paper and the docstring read."""
    frames = list(range(len(tokens)))
    places = range(len(tokens[0]))
    while len(frames) > 4 and -(-len(frames) // 4) * len(places) > budget:
        frames = [frame for index, frame in enumerate(frames) if index % 4 == 0]
    firsts = [frames[index] for index in range(0, len(frames), 4)]
    others = [index for index in range(len(frames)) if index % 4]
    if len(firsts) * len(places) <= budget:
        out = {(f, p): tokens[f][p] for f in firsts for p in places}
        shares = dealt(budget - len(out), [len(places)] * len(others))
    else:
        share, *shares = dealt(budget, [len(places)] * len(frames))
        out = {(0, i * len(places) // share): tokens[0][i * len(places) // share] for i in range(share)}
    for index, share in zip(others, shares, strict=True):
        frame, reference = frames[index], frames[{1: index - 1, 2: index - 2, 3: index - 1}[index % 4]]
        like = {p: signed_square(tokens[frame][p], tokens[reference][p]) for p in places}
        out |= {(frame, p): tokens[frame][p] for p in sorted(places, key=lambda p: (like[p], p))[:share]}
    return out


@examples(500)
@given(case=cases(most_frames=20, most_tokens=5))
def test_keeps_what_differs_most_in_its_window(case):
    drawn, budget = case
    kept = keep(drawn, budget)
    agrees(kept, by_the_rules(plain(drawn)[0], budget), drawn)
    assert torch.equal(kept.tokens, drawn.features[tuple(kept.places.T)])  # nothing is averaged


@pytest.mark.parametrize(("rate", "share"), [(0.3, 0.775), (0.5, 0.625), (0.7, 0.475)])
def test_leaves_of_windows_what_the_paper_says(rate, share):
    """A frame whole, and of three others all but the rate."""
    drawn = video(0, 8, 20, 6)
    assert round(share * 8 * 20) == 2 * (20 + 3 * round((1 - rate) * 20))
    kept = keep(drawn, round(share * 8 * 20))
    number = torch.bincount(kept.places[:, 0], minlength=8).tolist()
    assert number == [20, *[round((1 - rate) * 20)] * 3] * 2


def test_below_a_quarter_windows_are_of_first_frames():
    drawn = video(1, 32, 6, 4)
    kept = keep(drawn, round(0.1 * 32 * 6))
    number = torch.bincount(kept.places[:, 0], minlength=32)
    assert number[[0, 16]].tolist() == [6, 6]
    assert number[[4, 8, 12, 20, 24, 28]].tolist() == [2, 1, 1, 1, 1, 1]


def test_of_less_than_one_frame_every_frame_of_the_last_window_has_some():
    kept = keep(video(2, 12, 8, 4), 7)
    assert kept.places[:, 0].tolist() == [0, 0, 0, 4, 4, 8, 8]
    assert kept.places[:3].tolist() == [[0, 0], [0, 2], [0, 5]]


def test_an_object_that_moves_is_kept_and_the_background_once():
    features = torch.ones(4, 9, 3)
    for frame in range(4):
        features[frame, 2 * frame] = torch.tensor([1.0, -1.0, 0.5])
    kept = keep(video(0, 4, 9, 3)._replace(features=features), 9 + 6)
    moving = [[1, 0], [1, 2], [2, 0], [2, 4], [3, 4], [3, 6]]
    assert kept.places[9:].tolist() == moving
