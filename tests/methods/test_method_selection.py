import plain_tokens
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st

from earlytom_compile.methods.selection import best, even_shares, first_of, kept, proportional_shares


@st.composite
def shared(draw, least=0):
    sizes = draw(st.lists(st.integers(least, 9), min_size=1, max_size=8).filter(any))
    return draw(st.integers(0, sum(sizes))), sizes


@examples(200)
@given(shared())
def test_even_shares_are_dealt_one_by_one(given_):
    assert even_shares(*given_) == plain_tokens.dealt(*given_)


@examples(200)
@given(shared())
def test_proportional_shares_have_the_largest_remainders(given_):
    budget, sizes = given_
    shares = proportional_shares(budget, sizes)
    assert shares == plain_tokens.proportional(budget, sizes)
    assert sum(shares) == budget and all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))


@examples(100)
@given(
    scores=st.integers(1, 7).flatmap(
        lambda width: st.lists(st.lists(st.integers(-2, 2), min_size=width, max_size=width), min_size=1, max_size=5)
    ),
    data=st.data(),
)
def test_best_are_the_highest_and_of_equal_ones_the_first(scores, data):
    numbers = [data.draw(st.integers(0, len(row))) for row in scores]
    chosen = best(torch.tensor(scores).double(), numbers)
    for row, number, taken in zip(scores, numbers, chosen.tolist(), strict=True):
        assert {index for index, one in enumerate(taken) if one} == plain_tokens.highest(dict(enumerate(row)), number)


@examples(50)
@given(chosen=st.lists(st.booleans(), min_size=6, max_size=6).filter(any))
def test_kept_are_in_time_and_raster_order(chosen):
    tokens = torch.arange(12.0).view(2, 3, 2)
    flags = torch.tensor(chosen).view(2, 3)
    places = [(index // 3, index % 3) for index, one in enumerate(chosen) if one]
    result = kept(tokens, flags, len(places))
    assert [tuple(place) for place in result.places.tolist()] == places
    assert torch.equal(result.tokens, torch.stack([tokens[place] for place in places]))
    assert first_of(flags, 1).tolist() == [chosen.index(True)]
