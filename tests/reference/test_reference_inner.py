"""Stage 3 of ``variant="paper"``: merging visual tokens inside the LLM, as properties."""

import brute_force
import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st

from earlytom_compile.errors import EarlyTomConfigError
from earlytom_compile.reference import merge_inner_tokens

some = examples(60)


def assert_mean(actual, expected, hidden):
    """Means of at most all L tokens [1, L, D] in float32, one side exact: L roundings of numbers no larger than L times
    the largest, divided by L, and one of the result on either side."""
    atol = (hidden.shape[1] + 2) * 2.0**-24 * hidden.abs().max().item()
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@st.composite
def prompts(draw):
    before, image, after = draw(st.integers(0, 4)), draw(st.integers(0, 12)), draw(st.integers(1, 4))
    length, channels = before + image + after, draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    whole = draw(st.booleans())  # whole numbers tie
    hidden = torch.randn(1, length, channels, generator=generator)
    scores = torch.rand(length, generator=generator)
    return {
        "hidden": hidden.round() if whole else hidden,
        "scores": (4 * scores).round() if whole else scores,
        "image_start": before,
        "image_length": image,
        "drop_ratio": draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.99])),
    }


def merge(arguments, **changes):
    return merge_inner_tokens(variant="paper", **{**arguments, **changes})


@some
@given(prompts())
def test_the_result_is_that_of_brute_force(arguments):
    hidden, kept = merge(arguments)
    expected = brute_force.merge_inner(
        arguments["hidden"][0].tolist(),
        arguments["scores"].tolist(),
        arguments["image_start"],
        arguments["image_length"],
        arguments["drop_ratio"],
    )
    assert kept.tolist() == list(expected)
    assert_mean(hidden[0], torch.tensor(list(expected.values())), arguments["hidden"])


@some
@given(prompts(), st.sampled_from(["paper", "released"]))
def test_the_share_that_stays_is_exact_and_positions_ascend(arguments, variant):
    hidden, kept = merge_inner_tokens(variant=variant, **arguments)
    image, length = arguments["image_length"], arguments["hidden"].shape[1]
    stay = min(image, max(1, round(image * (1 - arguments["drop_ratio"]))))
    assert kept.dtype == torch.int64 and hidden.shape == (1, len(kept), arguments["hidden"].shape[2])
    assert len(kept) == length - image + stay
    assert kept.tolist() == sorted(set(kept.tolist()))


@some
@given(prompts(), st.sampled_from(["paper", "released"]))
def test_text_is_untouched_and_has_no_part_in_it(arguments, variant):
    image = slice(arguments["image_start"], arguments["image_start"] + arguments["image_length"])
    hidden, kept = merge_inner_tokens(variant=variant, **arguments)
    is_text = torch.ones(arguments["hidden"].shape[1], dtype=torch.bool)
    is_text[image] = False
    assert torch.equal(hidden[0, is_text[kept]], arguments["hidden"][0, is_text])
    changed, scores = arguments["hidden"].clone(), arguments["scores"].clone()
    changed[0, is_text], scores[is_text] = 7.0, 7.0
    again, same = merge_inner_tokens(variant=variant, **{**arguments, "hidden": changed, "scores": scores})
    assert torch.equal(same, kept)
    assert torch.equal(again[0, ~is_text[kept]], hidden[0, ~is_text[kept]])


@some
@given(prompts())
def test_the_most_attended_visual_tokens_stay_of_ties_the_lower(arguments):
    start, length = arguments["image_start"], arguments["image_length"]
    kept = set(merge(arguments)[1].tolist())
    rank = {p: (-arguments["scores"][p].item(), p) for p in range(start, start + length)}
    dropped = [rank[p] for p in rank if p not in kept]
    assert all(rank[p] < worse for p in rank if p in kept for worse in dropped)


@some
@given(prompts())
def test_the_true_mean_of_equal_tokens_is_that_token(arguments):
    equal = arguments["hidden"][:, :1].expand_as(arguments["hidden"])
    hidden, kept = merge(arguments, hidden=equal)
    torch.testing.assert_close(hidden, equal[:, : len(kept)])


@some
@given(prompts())
def test_with_one_token_left_it_is_the_mean_of_all(arguments):
    image = slice(arguments["image_start"], arguments["image_start"] + arguments["image_length"])
    if arguments["image_length"]:
        hidden, kept = merge(arguments, drop_ratio=0.99)
        left = hidden[0, arguments["image_start"]]
        assert arguments["image_start"] <= kept[arguments["image_start"]] < image.stop
        assert_mean(left, arguments["hidden"][0, image].double().mean(0).float(), arguments["hidden"])


@some
@given(prompts(), st.sampled_from(["paper", "released"]))
def test_dropping_nothing_changes_nothing(arguments, variant):
    hidden, kept = merge_inner_tokens(variant=variant, **{**arguments, "drop_ratio": 0.0})
    assert torch.equal(hidden, arguments["hidden"])
    assert kept.tolist() == list(range(arguments["hidden"].shape[1]))


@some
@given(prompts())
def test_the_input_is_not_written_to_and_the_dtype_stays(arguments):
    before = arguments["hidden"].clone()
    merge(arguments)
    assert torch.equal(arguments["hidden"], before)
    assert merge(arguments, hidden=before.bfloat16())[0].dtype == torch.bfloat16


def test_released_halves_again_and_again_where_the_paper_takes_the_mean():
    hidden = torch.tensor([[[4.0], [8.0], [16.0]]])
    scores = torch.tensor([1.0, 0.5, 0.25])
    span = {"image_start": 0, "image_length": 3, "drop_ratio": 0.6}
    paper, kept = merge_inner_tokens(hidden, scores, variant="paper", **span)
    released, _ = merge_inner_tokens(hidden, scores, variant="released", **span)
    assert kept.tolist() == [0]
    torch.testing.assert_close(paper.flatten(), torch.tensor([28 / 3]))
    assert released.flatten().tolist() == [((4 + 8) / 2 + 16) / 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": ""}, "variant=''"),
        ({"hidden": torch.rand(2, 6, 3)}, r"\(2, 6, 3\).*every row of a batch"),
        ({"scores": torch.rand(5)}, r"\(5,\).*\(6,\)"),
        ({"scores": torch.full((6,), float("nan"))}, "NaN"),
        ({"image_start": 4}, "image_start=4, image_length=3.*6 positions"),
        ({"image_start": -1}, "image_start=-1"),
        ({"drop_ratio": 1.0}, r"drop_ratio=1.0.*\[0, 1\)"),
    ],
)
def test_bad_input_is_named(changes, message):
    arguments = {
        "hidden": torch.rand(1, 6, 3),
        "scores": torch.rand(6),
        "image_start": 2,
        "image_length": 3,
        "drop_ratio": 0.5,
        "variant": "paper",
        **changes,
    }
    with pytest.raises(EarlyTomConfigError, match=message):
        merge_inner_tokens(**arguments)
