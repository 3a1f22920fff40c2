import math
from fractions import Fraction

import plain_tokens
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from method_videos import DTYPES, KINDS, video

from earlytom_compile.methods.exact import fixed_point, frame_tokens, likeness, likenesses, squared_distances

tokens = st.builds(
    lambda seed, frames, tokens, channels, kind, dtype, scale: (
        video(seed, frames, tokens, channels, kind).features.mul(10.0**scale).to(dtype)
    ),
    seed=st.integers(0, 2**32 - 2),
    frames=st.integers(1, 5),
    tokens=st.integers(1, 6),
    channels=st.sampled_from([1, 2, 3, 5, 8, 100]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    scale=st.integers(-3, 3),
)


@examples(100)
@given(x=tokens)
def test_integers_are_the_tokens_to_half_a_unit(x):
    integers, unit = fixed_point(x)
    assert torch.equal(integers, integers.round()) and math.frexp(unit.item())[0] == 0.5
    assert ((integers * unit - x.double()).abs() <= unit / 2).all()
    expected, plain_unit = plain_tokens.fixed_point(x.double().flatten(0, 1).tolist())
    assert integers.flatten(0, 1).tolist() == expected and unit.item() == plain_unit


@examples(100)
@given(x=tokens)
def test_products_are_those_of_whole_numbers(x):
    integers, _ = fixed_point(x)
    frame = [[int(entry) for entry in token] for token in integers[0].tolist()]
    expected = [[plain_tokens.squared_distance(a, b) for b in frame] for a in frame]
    assert squared_distances(integers[:1])[0].tolist() == expected
    own, _ = fixed_point(x, each=True)
    plain = x.double().tolist()
    expected = [[plain_tokens.signed_square(a, b) for b in plain[-1]] for a in plain[0]]
    alike = likenesses(own[0], own[-1])
    for row, exact in zip(alike.tolist(), expected, strict=True):
        # a square, a product and a quotient, each rounded once
        assert all(abs(Fraction(x) - y) <= 2 * abs(y) * Fraction(1, 2**52) for x, y in zip(row, exact, strict=True))
    assert likeness(own[0], own[-1]).tolist() == alike.diagonal().tolist()


@examples(50)
@given(x=tokens)
def test_a_frame_points_where_its_mean_does(x):
    mean = x.double().mean(1)
    like = torch.nn.functional.cosine_similarity(frame_tokens(fixed_point(x)[0]), mean, dim=1)
    short = mean.norm(dim=1) < 1e-3 * x.double().abs().max()  # what is left of tokens that add up to nothing
    assert ((like > 1 - 1e-4) | short).all()


def test_equal_tokens_are_alike_and_zero_ones_like_none():
    x = torch.tensor([[[0.1, 0.7, -3.0], [0.0, 0.0, 0.0]], [[0.1, 0.7, -3.0], [1.0, 0.0, 0.0]]])
    own, _ = fixed_point(x, each=True)
    assert likeness(own[0], own[1]).tolist() == [1.0, 0.0]
    assert likeness(own, own).tolist() == [[1.0, 0.0], [1.0, 1.0]]


def test_a_threshold_that_is_met_exactly_is_not_passed():
    own, _ = fixed_point(torch.tensor([[4.0, 3.0], [7.0, 0.0], [-0.5, 0.0]]), each=True)
    assert likeness(own[0], own[1]).item() == 0.64 and likeness(own[0], own[2]).item() == -0.64


def test_sums_stay_below_what_float64_holds():
    for channels in (1, 2, 63, 64, 65, 3584):
        opposite = torch.stack([torch.ones(channels), -torch.ones(channels)]).double()
        opposite *= 1 - 2.0**-50
        distances = squared_distances(fixed_point(opposite)[0])
        assert 2.0**46 < distances.max() <= 2.0**50
