"""A conversation that goes on behind a prompt whose later layers hold fewer tokens: right, whatever was done to its
cache between two turns, or refused."""

import copy

import pytest
import torch
from generating import LAYOUTS, NEW, compiled, new_tokens, share_vision_paths
from generating import given as with_cache
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_llava_onevision, video_inputs

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.integrations.caches import cache_of

LAYER = 2
INNER = {"inner_layer": LAYER, "retain_ratio": 0.5, "strict": True}
TURN = torch.tensor([[7, 30, 11]])


def tiny():
    return tiny_llava_onevision(vision_layers=4, text_layers=4)


@pytest.fixture(scope="module")
def pristine():
    return tiny()


@pytest.fixture(scope="module")
def inner(one_trace):
    """The same model, compiled once for all tests: most of their time is Dynamo's, in the language model."""
    with pytest.MonkeyPatch.context() as patch:
        share_vision_paths(one_trace, patch)
        yield compiled(tiny(), **INNER)


def first_turn(model, layout="different numbers of videos"):
    """(the cache behind it, what of the prompt in it is attended to [R, S], the last token [R, 1], not in it yet)."""
    inputs = video_inputs(model, 8, **LAYOUTS[layout])
    output = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
    )
    cache = cache_of(output)
    rows, width = len(inputs["input_ids"]), cache.get_seq_length()
    lengths = [_length_of_row(model, inputs, row) for row in range(rows)]
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    return cache, mask, output.sequences[:, -1:]


def _length_of_row(model, inputs, row):
    """Positions of a row in the cache when it is alone."""
    seen = inputs["attention_mask"][row].bool()
    ids = inputs["input_ids"][row][seen]
    whole = int((ids == model.config.video_token_id).sum())
    videos = whole // (8 * 9 + 1)
    return len(ids) - whole + videos * (round(0.5 * 8 * 9) + 1) + 2  # two of the three new ones


@torch.no_grad()
def next_turn(model, cache, mask, last):
    """Logits [R, 4, vocab] of the last token and a turn behind it."""
    ids = torch.cat((last, TURN.expand(len(last), -1)), 1)
    mask = torch.cat((mask, torch.ones_like(ids)), 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, **with_cache(model, cache)).logits


@pytest.mark.parametrize(
    "layout", ["different numbers of videos", pytest.param("left padding", marks=pytest.mark.long)]
)
def test_a_second_turn_is_as_if_it_had_been_one(inner, layout):
    """The second turn's tokens in one piece, and one after another, as generate() has them."""
    cache, mask, last = first_turn(inner, layout)
    one_by_one = copy.deepcopy(cache)
    at_once = next_turn(inner, cache, mask, last)
    for place, ids in enumerate(torch.cat((last, TURN.expand(len(last), -1)), 1).T[..., None]):
        mask = torch.cat((mask, torch.ones_like(ids)), 1)
        position = mask.cumsum(1)[:, -1:] - 1
        with torch.no_grad():
            step = inner(input_ids=ids, attention_mask=mask, position_ids=position, **with_cache(inner, one_by_one))
        torch.testing.assert_close(step.logits[:, 0], at_once[:, place], atol=1e-4, rtol=1e-4)


def test_rows_of_a_cache_may_be_selected_and_repeated(inner):
    """As generate() does for beams, and whoever asks several things about one prompt."""
    cache, mask, last = first_turn(inner)
    expected = next_turn(inner, copy.deepcopy(cache), mask, last)

    @given(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.sampled_from(["select", "reorder", "mask"]))
    def selected(rows, how):
        rows = torch.tensor(rows)
        mine = copy.deepcopy(cache)
        if how == "mask":  # bool
            chosen = torch.zeros(3, dtype=torch.bool)
            chosen[rows] = True
            mine.batch_select_indices(chosen)
            rows = chosen.nonzero()[:, 0]
        else:
            (mine.batch_select_indices if how == "select" else mine.reorder_cache)(rows)
        got = next_turn(inner, mine, mask[rows], last[rows])
        torch.testing.assert_close(got, expected[rows], atol=1e-4, rtol=1e-4)

    selected()
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(repeats=2)
    got = next_turn(inner, repeated, *(x.repeat_interleave(2, 0) for x in (mask, last)))
    torch.testing.assert_close(got, expected.repeat_interleave(2, 0), atol=1e-4, rtol=1e-4)


def test_what_is_behind_the_prompt_may_be_cropped(inner):
    cache, mask, last = first_turn(inner)
    expected = next_turn(inner, copy.deepcopy(cache), mask, last)
    next_turn(inner, cache, mask, last)
    cache.crop(-4)
    torch.testing.assert_close(next_turn(inner, cache, mask, last), expected, atol=1e-4, rtol=1e-4)


def test_a_cache_that_was_cropped_into_its_prompt_is_refused(inner):
    cache, mask, last = first_turn(inner)
    cache.crop(-5)
    with pytest.raises(EarlyTomConfigError, match=r"cropped to \d+ of the \d+ positions of its prompt"):
        next_turn(inner, cache, mask[:, :-5], last)


@pytest.mark.parametrize("options, now", [({"inner_layer": 1}, "they go before layer 1"), ({}, "none go there")])
def test_a_cache_that_was_made_with_other_options_is_refused(model, inner, options, now):
    cache, mask, last = first_turn(inner)
    expected = next_turn(inner, copy.deepcopy(cache), mask, last)
    compiled(model, retain_ratio=0.5, **options)
    with pytest.raises(EarlyTomConfigError, match=f"went before layer 2 of the language model, and now {now}"):
        next_turn(model, cache, mask, last)
    torch.testing.assert_close(next_turn(inner, cache, mask, last), expected)


def test_a_cache_that_begins_anew_serves_every_model(model, inner):
    inputs = video_inputs(model, 8)
    cache, _, _ = first_turn(inner)
    cache.reset()
    if cache.get_seq_length():
        pytest.skip("this transformers fills a cache that grows with zeros and does not empty it")
    compiled(model, retain_ratio=0.5)
    expected = new_tokens(model, inputs)
    assert expected.shape == (1, NEW) and torch.equal(new_tokens(model, inputs, **with_cache(model, cache)), expected)
