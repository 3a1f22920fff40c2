"""Other ways to write it around ``generate()``: each compresses, or says ``earlytom_compile.compile(model)``."""

import warnings

import pytest
import torch
from effort import cases
from generating import new_tokens
from tiny_checkpoint import TinySize, write_checkpoint
from tiny_models import tiny_llava_onevision, video_inputs
from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration, pipeline

import earlytom_compile
from earlytom_compile import EarlyTomCompileError, EarlyTomFallbackWarning, report

OPTIONS = {"lowering": "eager"}
CURE = r"earlytom_compile\.compile\(model"


@pytest.fixture
def model():
    return tiny_llava_onevision(vision_layers=2, text_layers=1)


@pytest.fixture
def inputs(model):
    return video_inputs(model, 6)


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="earlytom", options=OPTIONS)


def compiled_call(model):
    model.compile(backend="earlytom", options=OPTIONS)


def compiled_generate(model):
    model.generate = torch.compile(model.generate, backend="earlytom", options=OPTIONS)


@torch.no_grad()
@pytest.mark.parametrize(
    "spelling", cases((compiled_forward,), among=[(compiled_forward,), (compiled_call,), (compiled_generate,)])
)
def test_what_cannot_compress_names_the_spelling_that_can(spelling, model, inputs):
    wanted = new_tokens(model, inputs, max_new_tokens=1)
    spelling(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EarlyTomFallbackWarning)
        got = new_tokens(model, inputs, max_new_tokens=1)
    told = [str(each.message) for each in caught if issubclass(each.category, EarlyTomFallbackWarning)]
    if report(model).state != "compressing":  # transformers 5.17 encodes videos in forward()
        assert torch.equal(got, wanted)
        assert any("earlytom_compile.compile(model" in text for text in told), told


@torch.no_grad()
def test_generate_of_a_compiled_module_warns_of_videos(model, inputs):
    fast = torch.compile(model, backend="earlytom", options=OPTIONS)
    wanted = new_tokens(model, inputs)
    with pytest.warns(EarlyTomFallbackWarning, match=CURE):
        assert torch.equal(new_tokens(fast, inputs), wanted)
    text = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    assert torch.equal(new_tokens(fast, text), new_tokens(model, text)), "and of nothing else"
    strict = torch.compile(model, backend="earlytom", options={**OPTIONS, "strict": True})
    with pytest.raises(EarlyTomCompileError, match=CURE):
        new_tokens(strict, inputs)


@torch.no_grad()
def test_generate_of_other_compiled_modules_is_their_own(model, inputs):
    torch.compile(model, backend="earlytom")
    assert torch.compile(model, backend="eager").generate == model.generate
    assert not hasattr(torch.compile(torch.nn.Linear(1, 1), backend="earlytom"), "generate")
    earlytom_compile.compile(model, **OPTIONS)
    fast = torch.compile(model, backend="earlytom", options=OPTIONS)
    assert torch.equal(new_tokens(fast, inputs), new_tokens(model, inputs))
    assert report(model).last_call == "compressed"


@pytest.mark.long  # test_pipeline.py has what is compiled in place, and the warning is that of generate()
@torch.no_grad()
def test_pipelines(tmp_path):
    folder = write_checkpoint(tmp_path, TinySize(48, 8, 4, 64, 1, 64))
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder).eval()
    clip = torch.randint(0, 256, (8, 3, 96, 96), dtype=torch.uint8)
    question = [{"type": "video", "video": clip}, {"type": "text", "text": "what happens ?"}]

    def ask(model):
        answer = pipeline("image-text-to-text", model=model, processor=processor)
        return answer(text=[{"role": "user", "content": question}], max_new_tokens=4, return_tensors=True)

    with pytest.warns(EarlyTomFallbackWarning, match=CURE):
        ask(torch.compile(model, backend="earlytom", options=OPTIONS))
    ask(earlytom_compile.compile(model, **OPTIONS))
    content = report(model).to_dict()
    assert content["last_call"] == "compressed"
    assert content["prompt"][1] < content["prompt"][0]
