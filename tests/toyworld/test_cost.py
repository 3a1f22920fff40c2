"""Operations of a prefill, counted beside torch's own counter and from the paper's formula; tokens inside the model."""

import dataclasses
import math
from dataclasses import replace

import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from torch_counter import counter

from earlytom_compile.flops_inside import lengths_inside, operations_inside, rows_left
from earlytom_compile.kernels.inner_tokens import attention_paid, keep_inner_tokens
from earlytom_compile.methods.base import Step
from earlytom_compile.shapes import ModelShape, shape_of
from earlytom_compile.toyworld import cost, methods
from earlytom_compile.toyworld.answers import FIRST_TOKEN, normalized, prompt_ids, prompt_length
from earlytom_compile.toyworld.checkpoint import build_model
from earlytom_compile.toyworld.evaluate import Arm, evaluate, load_questions
from earlytom_compile.toyworld.installed import Installed
from earlytom_compile.toyworld.language import build_tokenizer
from earlytom_compile.toyworld.model import SHAPE, VIDEO_TOKENS
from earlytom_compile.toyworld.questions import all_questions
from earlytom_compile.toyworld.world import sample_video


@pytest.fixture(scope="module")
def model():
    return build_model(replace(SHAPE, vision_layers=3, text_layers=4), build_tokenizer(), seed=2).eval()


@pytest.fixture(scope="module")
def video():
    return sample_video("test", 3)


def counted_by_torch(call):
    with torch.no_grad(), counter() as counted:
        call()
    return counted.get_total_flops()


def test_a_whole_prefill_of_all_tokens_is_what_torch_counts(model, video):
    question, pixels = all_questions(video)[0], normalized(torch.from_numpy(video.frames()))
    ids = torch.tensor([prompt_ids(question, VIDEO_TOKENS + 1)])
    expected = counted_by_torch(lambda: model.generate(input_ids=ids, pixel_values_videos=pixels[None], **FIRST_TOKEN))
    before = methods.method(methods.ALL_TOKENS, model, 0.1)(pixels).flops
    shape, length = ModelShape.from_config(model.config), prompt_length(question, VIDEO_TOKENS)
    assert length == ids.shape[1]
    assert before + cost.of_prompt(shape, length, VIDEO_TOKENS) == expected


STEPS = ((), (Step(3, 0.5, "mean"),), (Step(1, 0.3, "drop"), Step(2, 0.1, "drop", scores="all")))


@pytest.mark.parametrize("steps", STEPS)
def test_what_the_language_model_costs_layer_by_layer(model, steps):
    """One layer of each length, run by itself; what the steps cost is written out."""
    shape, tokens, words, width = ModelShape.from_config(model.config), 40, 12, SHAPE.text_width
    length, rows, products = words + tokens + 1, tokens + 1, 0
    expected = 0
    layers = model.model.language_model.layers
    for number, layer in enumerate(layers):
        for step in steps:
            if step.layer == number:
                left = max(1, round(rows * step.keep_ratio))
                shorter = words + left
                products += 2 * (length if step.scores == "all" else 1) * length * width
                products += 0 if step.merge == "drop" else 2 * 2 * length * shorter * width
                length = shorter
        hidden = torch.zeros(1, length, width)
        angles = model.model.language_model.rotary_emb(hidden, torch.arange(length)[None])
        expected += counted_by_torch(lambda each=layer, x=hidden, at=angles: each(x, position_embeddings=at))
    expected += counted_by_torch(lambda: model.lm_head(torch.zeros(1, 1, width)))
    assert cost.of_prompt(shape, words + tokens + 1, tokens, steps) == expected + products


def test_tokens_inside_are_those_of_the_cache(model, video):
    """What is counted of each layer is what each layer's cache holds after a call as users make it."""
    question, pixels = all_questions(video)[0], normalized(torch.from_numpy(video.frames()))
    compress = Installed(model, {"retain_ratio": 0.25, "inner_layer": 3})
    tokens = len(compress(pixels).tokens)
    ids = torch.tensor([prompt_ids(question, VIDEO_TOKENS + 1)])
    output = compress.model.generate(
        input_ids=ids, pixel_values_videos=pixels[None], return_dict_in_generate=True, **FIRST_TOKEN
    )
    held = [layer.keys.shape[2] for layer in output.past_key_values.layers]
    length = prompt_length(question, tokens)
    lengths = lengths_inside(length, [tokens + cost.NEWLINE], compress.steps)
    assert held == [lengths[max(first for first in lengths if first <= layer)] for layer in range(4)]
    assert held[3] < held[2] == length
    mean = sum(positions - (length - tokens - 1) for positions in held) / 4 - 3 / 4  # the newline of three layers
    assert cost.mean_over_layers(tokens, compress.steps, 4) == pytest.approx(mean)


RATIOS = st.floats(0.01, 1.0)


@examples(100)
@given(st.lists(st.integers(1, 300), max_size=3), st.integers(1, 50), st.lists(RATIOS, max_size=3), st.data())
def test_lengths_are_those_of_every_video_by_itself(videos, words, ratios, data):
    layers = sorted(data.draw(st.sets(st.integers(1, 27), min_size=len(ratios), max_size=len(ratios))))
    steps = tuple(Step(layer, ratio, "drop") for layer, ratio in zip(layers, ratios, strict=True))
    lengths = lengths_inside(words + sum(videos), videos, steps)
    assert list(lengths) == [0, *layers] and lengths[0] == words + sum(videos)
    for step in steps:
        assert lengths[step.layer] == words + sum(rows_left(rows, step) for rows in videos)
    for rows in videos:
        for ratio in ratios:
            left = rows_left(rows, Step(1, ratio, "drop"))
            assert 1 <= left <= rows and (left == 1 or abs(left - rows * ratio) <= 0.5)
    shape = dataclasses.replace(shape_of("cpu-tiny"), llm_layers=28)
    cheap, dear = (
        operations_inside(shape, lengths, [step._replace(merge=merge) for step in steps]) for merge in ("drop", "mean")
    )
    assert cheap <= dear and (cheap == 0) == (not steps)


def test_a_row_costs_the_mean_of_its_questions(model):
    questions = load_questions("validation", 7, 4)
    found = evaluate(model, questions, Arm("only stage 2", 0.25)).cost
    shape, tokens = ModelShape.from_config(model.config), round(0.25 * VIDEO_TOKENS)
    compress = methods.method("only stage 2", model, 0.25)
    each = [
        compress(normalized(frames)).flops + cost.of_prompt(shape, prompt_length(question, tokens), tokens)
        for frames, asked in zip(questions.frames, questions.asked, strict=True)
        for question in asked
    ]
    assert len(each) == sum(map(len, questions.asked))
    assert math.isclose(found.flops, sum(each) / len(each), rel_tol=1e-12)
    assert (found.tokens, found.layer_tokens, found.work) == (tokens, tokens, 1)


@pytest.mark.parametrize("scores", ["last", "all"])
@pytest.mark.parametrize("merge", ["mean", "sequential", "drop"])
def test_a_step_costs_what_its_operators_multiply(merge, scores):
    """The bodies of the operators themselves, under torch's counter."""
    heads, keys, width, step = 4, 2, 8, Step(2, 0.3, merge, scores)
    shape = dataclasses.replace(
        shape_of("cpu-tiny"), llm_layers=28, llm_width=heads * width, llm_heads=heads, llm_kv_heads=keys
    )
    lengths = lengths_inside(23, [16], (step,))
    query, key, hidden = torch.randn(1, heads, 23, width), torch.randn(1, keys, 23, width), torch.randn(1, 23, 32)
    video_of = torch.tensor([[-1] * 3 + [0] * 16 + [-1] * 4])
    slots = torch.tensor([[0, 1, 2, *[-2] * rows_left(16, step), 19, 20, 21, 22]])

    def both():
        paid = attention_paid._init_fn(query, key, None, torch.tensor([22]), 1.0, True, scores == "all")
        keep_inner_tokens._init_fn(hidden, paid, video_of, slots, merge)

    assert slots.shape[1] == lengths[2]
    assert operations_inside(shape, lengths, (step,)) == counted_by_torch(both)
