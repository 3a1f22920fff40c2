"""What ``generate()`` does with the prompt besides reading it, beside the plain model at a ratio of 1."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from generating import compiled, new_tokens, oracle_tokens
from tiny_models import tiny_llava_onevision, video_inputs
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

import earlytom_compile
from earlytom_compile import EarlyTomFallbackWarning, report

EVERYTHING = {"retain_ratio": 1.0, "tau_seg": -1.0, "tau_merge": 1.0}  # no frame merges, no token goes
GREEDY = {"do_sample": False, "pad_token_id": 0}


def both(model, inputs, *args, **kwargs):
    """(the plain model's, the compiled model's) output of the same call."""
    plain = model.generate(inputs["input_ids"], *args, **without_ids(inputs), **kwargs)
    return plain, compiled(model, **EVERYTHING).generate(inputs["input_ids"], *args, **without_ids(inputs), **kwargs)


def without_ids(inputs):
    return {name: value for name, value in inputs.items() if name != "input_ids"}


@pytest.mark.parametrize(
    "name, value",
    [("assistant_model", "itself"), ("prompt_lookup_num_tokens", 2), ("encoder_repetition_penalty", 1.7)]
    + [("encoder_no_repeat_ngram_size", 2), ("prefill_chunk_size", 8)],
)
@pytest.mark.parametrize("place", ["keyword", "config"])
def test_what_needs_the_ids_of_the_prompt_runs_uncompressed(model, name, value, place):
    if name == "assistant_model":
        if place == "config":
            pytest.skip("a model is no option of a config")
        value = tiny_llava_onevision(vision_layers=1, text_layers=1, seed=5)
    inputs = video_inputs(model, 12)
    options = {**GREEDY, "max_new_tokens": 6, name: value}
    if place == "config":
        options = {"generation_config": GenerationConfig(**options)}
    expected = model.generate(**inputs, **options)
    compiled(model)
    with pytest.warns(EarlyTomFallbackWarning, match=f"{name}.*Leave"):
        got = model.generate(**inputs, **options)
    assert torch.equal(got, expected)


def test_rows_that_ended_by_a_criterion_are_padded(model):
    inputs = video_inputs(model, 12, videos_per_row=(1, 1), before=(2, 4))
    greedy = model.generate(**inputs, **GREEDY, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    ends = StoppingCriteriaList([EosTokenCriteria(eos_token_id=[int(greedy[0, 1])])])
    plain, ours = both(model, inputs, **GREEDY, max_new_tokens=8, stopping_criteria=ends)
    assert torch.equal(plain, ours)
    assert not plain[0, inputs["input_ids"].shape[1] + 2 :].any()  # it ended, and the other did not
    assert plain[1, -1] != 0


@pytest.mark.parametrize("more", [{}, {"max_new_tokens": 6}, {"max_new_tokens": 40}])
@pytest.mark.parametrize("room", [3, 17])
def test_a_criterion_of_length_replaces_generates_own(model, more, room):
    inputs = video_inputs(model, 12)
    length = inputs["input_ids"].shape[1] + room
    criteria = StoppingCriteriaList([MaxLengthCriteria(length)])
    plain, ours = both(model, inputs, **GREEDY, **more, stopping_criteria=criteria)
    assert plain.shape[1] == ours.shape[1] == length
    fewer = compiled(model).generate(**inputs, **GREEDY, **more, stopping_criteria=criteria)
    assert fewer.shape[1] == length and criteria[0].max_length == length


@pytest.mark.parametrize("of_model", [{"max_length": 80}, {"max_length": 90, "min_length": 85}, {}])
@pytest.mark.parametrize("of_call", [None, {}, {"max_length": 100}, {"max_new_tokens": 4}, {"min_length": 120}])
def test_limits_come_from_wherever_transformers_takes_them(model, monkeypatch, of_model, of_call):
    inputs = video_inputs(model, 4)
    monkeypatch.setattr(model, "generation_config", GenerationConfig(**of_model, pad_token_id=0))
    call = {} if of_call is None else {"generation_config": GenerationConfig(do_sample=False, **of_call)}
    with monkeypatch.context() as ended:  # every token ends a row, unless it must be longer
        ended.setattr(model.generation_config, "eos_token_id", list(range(3, 118)))
        lengths = [model.generate(**inputs, **call).shape[1]]
        lengths.append(compiled(model).generate(**inputs, **call).shape[1])
        earlytom_compile.restore(model)
    lengths.append(model.generate(**inputs, **call).shape[1])
    lengths.append(compiled(model).generate(**inputs, **call).shape[1])
    assert lengths[0] == lengths[1] and lengths[2] == lengths[3]
    assert of_call is None or call["generation_config"].max_length == of_call.get("max_length")  # not ours to change


@pytest.mark.parametrize("where", ["keyword", "config", "first behind the ids", "the model's", "the model's, a config"])
def test_padding_is_seen_without_a_mask(model, monkeypatch, where):
    inputs = video_inputs(model, 12, videos_per_row=(1, 1), left_padding=(0, 7))
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 7)
    args, options = (), {"do_sample": False, "max_new_tokens": 6}
    if where.startswith("the model's"):
        monkeypatch.setattr(model, "generation_config", GenerationConfig(pad_token_id=7))
    else:
        options["pad_token_id"] = 7
    if where == "first behind the ids":
        args, options = (GenerationConfig(**options),), {}
    elif where.endswith("config"):
        options = {"generation_config": GenerationConfig(**options)}
    masked, ids = without_ids(inputs), inputs["input_ids"]
    unmasked = {name: value for name, value in masked.items() if name != "attention_mask"}
    compiled(model)
    assert torch.equal(
        model.generate(ids, *args, **masked, **options), model.generate(ids, *args, **unmasked, **options)
    )


class Seen(BaseStreamer):
    def __init__(self):
        self.shapes = []

    def put(self, value):
        self.shapes.append(tuple(value.shape))

    def end(self):
        self.shapes.append("end")


def test_arguments_by_their_place_are_those_by_name(model):
    inputs, seen = video_inputs(model, 12), []
    length = inputs["input_ids"].shape[1]

    def note(ids, scores, **kwargs):
        seen.append(ids.shape[1])
        return scores

    def never(ids, scores, **kwargs):
        seen.append(ids.shape[1])
        return torch.zeros(len(ids), dtype=torch.bool)

    def allowed(row, ids):
        seen.append(len(ids))
        return list(range(3, 100))

    streamer, config = Seen(), GenerationConfig(**GREEDY, max_new_tokens=2)
    args = config, LogitsProcessorList([note]), StoppingCriteriaList([never]), allowed, False, None, streamer
    compiled(model)
    by_place = model.generate(inputs["input_ids"], *args, **without_ids(inputs))
    assert sorted(seen) == sorted([length, length, length + 1, length + 1, length + 1, length + 2])
    assert streamer.shapes == [(1, length), (1,), (1,), "end"]
    assert torch.equal(by_place, model.generate(**inputs, **GREEDY, max_new_tokens=2, prefix_allowed_tokens_fn=allowed))
    with pytest.raises(TypeError, match="multiple values for argument 'generation_config'"):
        model.generate(inputs["input_ids"], config, generation_config=config)
    with pytest.raises(TypeError, match="positional arguments"):
        model.generate(*range(30))


def test_a_call_from_inside_another_is_compressed_as_ever(model):
    film, text, lengths = video_inputs(model, 12), video_inputs(model, 12, videos_per_row=(0,)), []

    def look(ids, scores, **kwargs):
        lengths.append(model(**film).logits.shape[1])
        return torch.zeros(len(ids), dtype=torch.bool)

    with torch.no_grad():
        expected = compiled(model)(**film).logits.shape[1]
        assert expected < film["input_ids"].shape[1]
        for inputs in (text, film):
            model.generate(**inputs, **GREEDY, max_new_tokens=2, stopping_criteria=StoppingCriteriaList([look]))
    assert lengths == [expected] * 4


# --- Other threads --------------------------------------------------------------------------------


def test_calls_while_another_thread_compiles(unshared, monkeypatch):
    inputs, expected = video_inputs(unshared, 12), oracle_tokens(unshared, video_inputs(unshared, 12))
    compiled(unshared)
    with torch.no_grad():
        logits = unshared(**inputs).logits
        monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)  # which is one for all threads
        for model in (unshared, compiled(tiny_llava_onevision(vision_layers=4, text_layers=1))):  # warm, and cold
            torch.testing.assert_close(model(**inputs).logits, logits)
            assert torch.equal(new_tokens(model, inputs), expected)


def test_threads_that_meet_at_the_first_call_compile_once(unshared):
    inputs = video_inputs(unshared, 12)
    expected = oracle_tokens(unshared, inputs)
    compiled(unshared)
    start = threading.Barrier(4)

    def ask(_):
        start.wait()
        return new_tokens(unshared, inputs)

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(tokens, expected) for tokens in pool.map(ask, range(4)))
    assert len(report(unshared).to_dict()["compilations"]) == 1
