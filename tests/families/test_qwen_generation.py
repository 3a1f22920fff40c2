"""What ``generate()`` of a Qwen model does with a prompt besides reading it, compressed or not: as any other model."""

import warnings

import pytest
import torch
import transformers
from generating import NEW, given, new_tokens, share_vision_paths
from qwen_calls import EVERYTHING, compressing, model_of, oracle_tokens, prompt_of, supported, takes_features, twin_of
from tiny_qwen import PLAIN_KINDS, row_alone, tiny_qwen
from torch.torch_version import TorchVersion
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import earlytom_compile
from earlytom_compile import EarlyTomConfigError, EarlyTomFallbackWarning, report, reporting
from earlytom_compile.integrations.caches import cache_of


@pytest.fixture(scope="module", params=supported(PLAIN_KINDS, long=("qwen3_5",)))
def kind(request, one_trace):
    with pytest.MonkeyPatch.context() as patch:
        share_vision_paths(one_trace, patch)
        yield request.param
    for use in ("compressed", "everything kept"):
        earlytom_compile.restore(model_of(request.param, use))
    reporting._RESTORED.clear()


@pytest.fixture
def model(kind):
    return compressing(model_of(kind))


@pytest.fixture
def whole(kind):
    """Compiled, and all tokens kept."""
    return compressing(model_of(kind, "everything kept"), **EVERYTHING)


@pytest.fixture
def twin(kind):
    return twin_of(kind)


SAMPLING = {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2}
BEHAVIOURS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": SAMPLING,
    "beams that sample": {"num_beams": 2, **SAMPLING},
    "static cache": {"cache_implementation": "static"},
    "without a cache": {"use_cache": False},
    "repetition": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "one token": {"max_new_tokens": 1},
}


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_with_everything_kept_each_behaviour_is_the_models_own(whole, twin, behaviour):
    inputs, tokens = prompt_of(twin, "everything"), []
    for each in (twin, whole):
        torch.manual_seed(3)
        tokens.append(new_tokens(each, inputs, **BEHAVIOURS[behaviour]))
    assert torch.equal(*tokens)
    assert report(whole).to_dict()["last_call"] == "compressed"


@pytest.mark.parametrize("behaviour", ["beams", "static cache", "without a cache"])
def test_compressed_each_row_is_what_it_is_alone(model, twin, behaviour):
    inputs, chosen = prompt_of(model, "padding"), BEHAVIOURS[behaviour]
    together = new_tokens(model, inputs, **chosen)
    copies = len(together) // 3
    for row in range(3):
        alone = new_tokens(model, row_alone(inputs, row), **chosen)
        assert torch.equal(alone, together[copies * row : copies * (row + 1)])
    if copies == 1:
        assert torch.equal(together, oracle_tokens(twin, inputs))


def test_sampling_is_repeated_by_its_seed(model):
    inputs, drawn = prompt_of(model, "one video"), []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        drawn.append(new_tokens(model, inputs, **SAMPLING))
    assert drawn[0].shape == (2, NEW)
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])


class Collect(BaseStreamer):
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, value):
        self.seen.append(value.flatten())

    def end(self):
        self.ended = True


def test_what_looks_at_the_prompt_sees_the_callers(model, twin):
    inputs, streamer, seen = prompt_of(model, "one video"), Collect(), []
    length = inputs["input_ids"].shape[1]

    def look(ids, scores, **kwargs):
        seen.append(ids)
        return scores

    def stop(ids, scores, **kwargs):
        seen.append(ids)
        return torch.full((len(ids),), ids.shape[1] >= length + 3)

    looking = {"logits_processor": LogitsProcessorList([look]), "stopping_criteria": StoppingCriteriaList([stop])}
    got = new_tokens(model, inputs, streamer=streamer, **looking)
    assert got.shape == (1, 3) and streamer.ended
    assert all(torch.equal(ids[:, :length], inputs["input_ids"]) for ids in [*seen, streamer.seen[0][None]])
    assert torch.equal(torch.cat(streamer.seen[1:]), got[0])
    assert torch.equal(got, oracle_tokens(twin, inputs)[:, :3])


def test_limits_count_the_callers_prompt(model):
    inputs = prompt_of(model, "one video")
    limit = inputs["input_ids"].shape[1] + 4
    output = model.generate(**inputs, max_length=limit, do_sample=False, pad_token_id=0)
    assert output.shape[1] == limit


def test_the_ids_may_come_first(model):
    inputs = prompt_of(model, "one video")
    expected = new_tokens(model, inputs)
    ids = inputs.pop("input_ids")
    output = model.generate(ids, **inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(output.sequences[:, : ids.shape[1]], ids)
    assert torch.equal(output.sequences[:, ids.shape[1] :], expected)


def test_the_next_turn_cannot_continue_a_cut_cache(model):
    inputs = prompt_of(model, "one video")
    output = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(EarlyTomConfigError, match="Start the next turn without a cache"):
        model.generate(input_ids=output.sequences, max_new_tokens=2, **given(model, cache_of(output)))


@pytest.mark.skipif(TorchVersion(transformers.__version__) < "5.23", reason="the models themselves fail in chunks")
def test_a_prompt_in_chunks_of_its_ids_runs_uncompressed(model, twin):
    inputs = prompt_of(model, "one video")
    with pytest.warns(EarlyTomFallbackWarning, match="prefill_chunk_size.*Leave"):
        got = new_tokens(model, inputs, prefill_chunk_size=8)
    assert torch.equal(got, new_tokens(twin, inputs, prefill_chunk_size=8))


@pytest.mark.parametrize(
    "kind, name",
    [("qwen2_5_vl", "prompt_lookup_num_tokens"), pytest.param("qwen3_vl", "assistant_model", marks=takes_features)],
    indirect=["kind"],
    scope="module",
)
def test_assisted_decoding_runs_uncompressed(model, twin, name):
    inputs = prompt_of(model, "one video")
    assistance = {name: 2 if name == "prompt_lookup_num_tokens" else tiny_qwen("qwen3_vl", vision_layers=5, seed=5)}
    with pytest.warns(EarlyTomFallbackWarning, match=f"{name}.*Leave"):
        got = new_tokens(model, inputs, **assistance)
    assert torch.equal(got, new_tokens(twin, inputs, **assistance))


@pytest.mark.parametrize("asked", [{"prompt_lookup_num_tokens": 2}, {"penalty_alpha": 0.6, "top_k": 4}])
@pytest.mark.parametrize("kind", ["qwen3_5"], indirect=True, scope="module")
def test_what_the_model_refuses_it_refuses_as_ever(model, twin, asked):
    """Layers of linear attention cannot go back to before a token; contrastive search is code of others."""
    inputs, told = prompt_of(model, "one video"), []
    for each in (twin, model):
        with warnings.catch_warnings(), pytest.raises(ValueError) as error:
            warnings.simplefilter("ignore", EarlyTomFallbackWarning)
            new_tokens(each, inputs, **asked)
        told.append(str(error.value))
    assert told[0] == told[1]


def test_a_call_without_a_video_is_bit_for_bit_as_before(model, twin):
    inputs = row_alone(prompt_of(model, "everything"), 3)
    assert "pixel_values" in inputs
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, twin(**inputs).logits)
    assert torch.equal(new_tokens(model, inputs), new_tokens(twin, inputs))
    assert report(model).to_dict()["last_call"] == "no video"
