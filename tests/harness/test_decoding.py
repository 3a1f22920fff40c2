"""Generation arguments of tasks, where answers end, and what goes into one call."""

import logging

import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.integrations.lmms_eval.generation import Decoding, StopTexts, batches, read_decoding

GREEDY = {"temperature": None, "top_p": None, "top_k": None}


@pytest.mark.parametrize(
    "task, meant",
    [
        ({}, {"max_new_tokens": 1024, "do_sample": False, "num_beams": 1, **GREEDY}),
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False},
            {"max_new_tokens": 16, "do_sample": False, "num_beams": 1, **GREEDY},
        ),
        ({"temperature": 0, "do_sample": True}, {"do_sample": False, **GREEDY}),
        ({"temperature": 0.7, "do_sample": False}, {"do_sample": False, **GREEDY}),
        ({"temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": None}),
        ({"do_sample": True, "top_k": 5}, {"do_sample": True, "temperature": 1.0, "top_k": 5}),
        ({"num_beams": 3, "repetition_penalty": 1.2}, {"num_beams": 3, "repetition_penalty": 1.2}),
        ({"max_new_tokens": "32"}, {"max_new_tokens": 32}),
    ],
)
def test_arguments_of_tasks(task, meant):
    arguments = read_decoding(task).arguments
    assert {name: arguments[name] for name in meant} == meant


@pytest.mark.parametrize("until, meant", [("\n\n", ("\n\n",)), (["a", ""], ("a",)), (None, ()), ([], ())])
def test_texts_that_end_an_answer(until, meant):
    assert read_decoding({"until": until}).until == meant


def test_what_is_not_known_is_refused_and_what_is_not_ours_said(caplog):
    with pytest.raises(EarlyTomConfigError, match="generation_kwargs have min_p=0.1, which is not known here"):
        read_decoding({"min_p": 0.1})
    with caplog.at_level(logging.WARNING):
        assert "image_aspect_ratio" not in read_decoding({"image_aspect_ratio": "pad"}).arguments
    assert "image_aspect_ratio='pad' of the task is left out" in caplog.text


@pytest.mark.parametrize(
    "text, until, answer",
    [("A. red\n\nB", ("\n\n",), "A. red"), (" red ", (), "red"), ("red|blue#x", ("#", "|"), "red"), ("#", ("#",), "")],
)
def test_an_answer_ends_at_the_first_of_them(text, until, answer):
    assert Decoding(until, {}).cut(text) == answer


@examples(60)
@given(st.lists(st.sampled_from([1, 2, 3]), max_size=20), st.integers(1, 5))
def test_calls_have_equal_arguments_at_most_so_many_and_every_request_once(kinds, size):
    requests = [{"max_new_tokens": kind, "until": ["\n"] * kind} for kind in kinds]
    found = list(batches(requests, size))
    assert sorted(place for places in found for place in places) == list(range(len(kinds)))
    for places in found:
        assert 1 <= len(places) <= size and len({kinds[place] for place in places}) == 1 and places == sorted(places)
    for kind in set(kinds):  # no more calls than it takes
        assert sum(kinds[places[0]] == kind for places in found) == -(-kinds.count(kind) // size)


def test_arguments_that_differ_in_values_of_a_dictionary_are_not_equal():
    assert len(list(batches([{"a": {"x": 1}}, {"a": {"x": 2}}], 2))) == 2


def test_a_row_stops_when_its_new_text_has_one_of_the_texts():
    words = ["<pad>", "red", ".", "blue", "stop"]
    decode = lambda rows: [" ".join(words[token] for token in row) for row in rows]  # noqa: E731
    stops = StopTexts(["."], decode)
    prompt = torch.tensor([[2, 2], [2, 2]])  # has the text, and does not count
    step = lambda *tokens: torch.cat([prompt, torch.tensor(tokens)], 1)  # noqa: E731
    assert stops(step([1], [3]), None).tolist() == [False, False]
    assert stops(step([1, 2], [3, 1]), None).tolist() == [True, False]
    assert stops(step([1, 2, 0], [3, 1, 2]), None).tolist() == [True, True]
