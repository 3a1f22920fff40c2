"""Stage 2 of ``variant="plus"``: the tokens that represent all others."""

import math

import brute_force
import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st

from earlytom_compile.errors import EarlyTomConfigError
from earlytom_compile.reference import select_representatives

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
some = examples(60)


@st.composite
def videos(draw):
    """Arguments of select_representatives that fit together; small whole numbers, so that many tokens are equal."""
    frames_in = draw(st.integers(1, 20))
    retain_ratio = draw(st.one_of(st.sampled_from([0.05, 0.1, 0.25, 1.0]), st.floats(0.01, 1.0)))
    frames = draw(st.integers(math.ceil(retain_ratio * frames_in), frames_in))
    shape = (frames, draw(st.sampled_from([1, 2, 3, 4, 17, 19])), draw(st.integers(1, 3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    most = draw(st.sampled_from([1, 3, 100]))
    features = torch.randint(-most, most + 1, shape, generator=generator).to(draw(st.sampled_from(DTYPES)))
    return {"features": features, "frames_in": frames_in, "retain_ratio": retain_ratio}


@some
@given(videos())
def test_the_selection_is_that_of_brute_force(arguments):
    expected = brute_force.represent(arguments["features"].tolist(), arguments["frames_in"], arguments["retain_ratio"])
    assert select_representatives(**arguments).tolist() == expected


@some
@given(videos())
def test_exactly_k_distinct_tokens_in_order(arguments):
    frames, tokens, _ = arguments["features"].shape
    kept = select_representatives(**arguments)
    assert len(kept) == max(1, round(arguments["retain_ratio"] * arguments["frames_in"] * tokens))
    places = (kept[:, 0] * tokens + kept[:, 1]).tolist()
    assert places == sorted(set(places)) and places[0] >= 0 and places[-1] < frames * tokens


def test_a_shift_and_a_scale_common_to_all_tokens_change_nothing():
    features = torch.randn(10, 6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options = {"frames_in": 10, "retain_ratio": 0.3}
    moved = 8 * features + torch.tensor([5.0, -3.0, 0.0, 1.0])
    assert torch.equal(select_representatives(features, **options), select_representatives(moved, **options))


def test_what_does_not_change_leaves_its_tokens_to_what_does():
    features = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(2)).repeat(16, 1, 1)
    features[8:] = torch.randn(8, 16, 32, generator=torch.Generator().manual_seed(3))
    kept = select_representatives(features, frames_in=16, retain_ratio=0.1)
    assert {token for frame, token in kept.tolist() if frame < 8} == set(range(16))  # all that is there to see
    kept = select_representatives(features, frames_in=16, retain_ratio=0.5)
    assert int((kept[:, 0] < 8).sum()) <= 48 and len(kept) == 128


def test_no_block_keeps_more_than_twice_its_even_share():
    features = torch.zeros(8, 48, 4)
    features[:, :16] = torch.randn(8, 16, 4, generator=torch.Generator().manual_seed(4))
    kept = select_representatives(features, frames_in=8, retain_ratio=0.1)
    assert len(kept) == 38 and int((kept[:, 1] < 16).sum()) == 26  # ceil(2 * 38 / 3)


def test_equal_tokens_keep_the_lower_index():
    kept = select_representatives(torch.full((2, 4, 3), 0.1), frames_in=2, retain_ratio=0.4)
    assert kept.tolist() == [[0, 0], [0, 1], [0, 2]]


def test_more_tokens_than_there_are_is_an_error_that_says_so():
    with pytest.raises(EarlyTomConfigError, match="asks for 30.*have only 20.*retain_ratio"):
        select_representatives(torch.rand(2, 10, 3), frames_in=6, retain_ratio=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.rand(4, 3)}, r"\(4, 3\).*frames, tokens, channels"),
        ({"features": torch.ones(4, 3, 2, dtype=torch.int64)}, "int64"),
        ({"features": torch.full((4, 3, 2), math.nan)}, "NaN or inf"),
        ({"features": torch.full((4, 3, 2), 1e300, dtype=torch.float64)}, "NaN or inf"),
        ({"frames_in": 0}, "frames_in=0"),
        ({"retain_ratio": 0}, r"retain_ratio=0.*\(0, 1\]"),
        ({"retain_ratio": math.nan}, "retain_ratio=nan"),
    ],
)
def test_bad_input_is_named(changes, message):
    arguments = {"features": torch.rand(4, 3, 2), "frames_in": 4, "retain_ratio": 0.5, **changes}
    with pytest.raises(EarlyTomConfigError, match=message):
        select_representatives(**arguments)
