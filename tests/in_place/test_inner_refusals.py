"""What a language model cannot do with fewer tokens in its later layers: said in every call, and answered without."""

import pytest
import torch
from generating import compiled, new_tokens, oracle_tokens
from tiny_models import tiny_llava_onevision, video_inputs
from transformers import LlavaOnevisionForConditionalGeneration

import earlytom_compile
from earlytom_compile import EarlyTomCompileError, EarlyTomConfigError, EarlyTomFallbackWarning, report
from earlytom_compile.integrations import prefill
from earlytom_compile.methods.base import Step
from earlytom_compile.passes.reasons import NotApplicable

INNER = {"inner_layer": 2, "retain_ratio": 0.5}


@pytest.fixture(scope="module")
def pristine():
    return tiny_llava_onevision(vision_layers=4, text_layers=3)


def warns(says):
    return pytest.warns(EarlyTomFallbackWarning, match=f"no tokens go inside the language model: {says}")


@torch.no_grad()
def test_labels(model):
    """The loss is that without: a label belongs to a position, and later layers have fewer."""
    inputs = video_inputs(model, 8)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.video_token_id, -100)
    compiled(model, retain_ratio=0.5)
    expected = model(**inputs, labels=labels)
    compiled(model, **INNER)
    with warns("each of its labels belongs to a position.*Leave labels out"):
        output = model(**inputs, labels=labels)
    torch.testing.assert_close(output.loss, expected.loss)
    assert report(model).to_dict()["inside"] == []
    compiled(model, strict=True, **INNER)
    with pytest.raises(EarlyTomCompileError, match="each of its labels"):
        model(**inputs, labels=labels)
    assert report(model).to_dict()["last_call"] == "failed"


def test_attention_over_the_prompt():
    model = tiny_llava_onevision(vision_layers=4, text_layers=3, attn_implementation="eager")
    inputs = video_inputs(model, 8)
    compiled(model, **INNER)
    with warns("output_attentions asks for all attention.*Leave output_attentions out"):
        output = model.generate(
            **inputs, max_new_tokens=2, pad_token_id=0, output_attentions=True, return_dict_in_generate=True
        )
    length = report(model).to_dict()["prompt"][1]
    assert [weights.shape[-2:] for weights in output.attentions[0]] == [(length, length)] * 3


@pytest.mark.usefixtures("shared_vision")
def test_sliding_windows():
    config = tiny_llava_onevision(vision_layers=4, text_layers=3).config
    config.text_config.sliding_window = 8
    config.text_config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    inputs = video_inputs(model, 8)
    without = new_tokens(compiled(model, retain_ratio=0.5), inputs)
    compiled(model, **INNER)
    with warns("some of its layers see a window of the prompt only"):
        assert torch.equal(new_tokens(model, inputs), without)


def test_a_graph_that_cannot_be_rewritten_is_said_in_every_call(model, monkeypatch):
    inputs = video_inputs(model, 8)
    without = new_tokens(compiled(model, retain_ratio=0.5), inputs)

    def cannot(*_):
        raise NotApplicable("a reason", "A cure")

    monkeypatch.setattr(prefill, "shorten", cannot)
    compiled(model, **INNER)
    for _ in range(2):
        with warns("a reason. A cure"):
            assert torch.equal(new_tokens(model, inputs), without)
        assert report(model).to_dict()["inside"] == []
    compiled(model, strict=True, **INNER)
    for _ in range(2):
        with pytest.raises(EarlyTomCompileError, match="a reason. A cure"):
            new_tokens(model, inputs)
        assert report(model).to_dict()["last_call"] == "failed"


def test_a_language_model_of_one_layer():
    with pytest.raises(EarlyTomConfigError, match="has layers 0 to 0. Leave it out"):
        compiled(tiny_llava_onevision(vision_layers=4, text_layers=1), inner_layer=1)


def test_layers_that_are_one_module_are_restored():
    model = tiny_llava_onevision(vision_layers=4, text_layers=3)
    layers = model.model.language_model.layers
    layers[2] = layers[1]
    before = dict(layers[1].__dict__)
    compiled(model, inner_layer=1)
    assert "forward" in layers[1].__dict__
    earlytom_compile.restore(model)
    assert layers[1].__dict__ == before


def test_a_generate_that_is_a_generator(model):
    """The first of its steps has the prompt, no other, and nothing is said."""

    class Streaming(type(model)):
        def generate(self, *args, **kwargs):
            yield super().generate(*args, **kwargs)
            yield "more"

    streaming = Streaming(model.config).eval()
    streaming.load_state_dict(model.state_dict())
    inputs = video_inputs(model, 8)
    expected = oracle_tokens(model, inputs, retain_ratio=0.5, steps=[Step(2, 0.5, "mean")])
    compiled(streaming, strict=True, **INNER)
    steps = list(streaming.generate(**inputs, max_new_tokens=expected.shape[1], do_sample=False, pad_token_id=0))
    assert torch.equal(steps[0][:, -expected.shape[1] :], expected) and steps[1] == "more"
    assert [step["layer"] for step in report(streaming).to_dict()["inside"]] == [2]
