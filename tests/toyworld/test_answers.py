"""Many questions in one row are answered as each of them alone, by the model's own code."""

import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration

from earlytom_compile.integrations.preprocess import conversation, load_processor
from earlytom_compile.toyworld.answers import answer_logits, generated, normalized, prompt_ids, prompt_length
from earlytom_compile.toyworld.batches import END, IDS, rows_of
from earlytom_compile.toyworld.installed import Installed
from earlytom_compile.toyworld.model import VIDEO_TOKENS, WEIGHTS, build_model, save
from earlytom_compile.toyworld.questions import all_questions
from earlytom_compile.toyworld.world import sample_video


@pytest.fixture(scope="module")
def model():
    return build_model(seed=3).eval()


@pytest.fixture(scope="module")
def processor(model, tmp_path_factory):
    return load_processor(str(save(model, tmp_path_factory.mktemp("toy"))))


@pytest.fixture(scope="module")
def videos():
    return [sample_video("test", seed) for seed in range(3)]


def inputs_for(processor, video, question):
    text = processor.apply_chat_template(conversation(question.text), add_generation_prompt=True)
    return processor(text=[text], videos=[video.frames()], return_tensors="pt")


def tokens_of(model, video):
    pixels = normalized(torch.from_numpy(video.frames()))
    return model.model.get_video_features(pixels[None], return_dict=True).pooler_output[0][:VIDEO_TOKENS]


def test_pixels_are_those_of_the_processor(processor, videos):
    given = inputs_for(processor, videos[0], all_questions(videos[0])[0])["pixel_values_videos"][0]
    torch.testing.assert_close(normalized(torch.from_numpy(videos[0].frames())), given, rtol=0, atol=1e-6)


@torch.no_grad()
def test_logits_are_those_of_forward(model, processor, videos):
    asked = [all_questions(video)[:4] for video in videos]
    logits, labels = answer_logits(model, [tokens_of(model, video) for video in videos], rows_of(asked))
    alone = [
        model(**inputs_for(processor, video, question)).logits[0, -1]
        for video, questions in zip(videos, asked, strict=True)
        for question in questions
    ]
    torch.testing.assert_close(logits[::2], torch.stack(alone), rtol=1e-4, atol=1e-5)
    answers = [IDS[question.answer] for questions in asked for question in questions]
    assert labels[::2].tolist() == answers
    assert labels[1::2].tolist() == [END] * len(answers)


@torch.no_grad()
def test_logits_behind_the_answer_are_those_of_forward(model, processor, videos):
    question = all_questions(videos[0])[0]
    logits, _ = answer_logits(model, [tokens_of(model, videos[0])], rows_of([[question]]))
    inputs = dict(inputs_for(processor, videos[0], question))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[IDS[question.answer]]])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    torch.testing.assert_close(logits[1], model(**inputs).logits[0, -1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_videos_of_different_lengths_do_not_disturb_each_other(model, videos):
    asked = [all_questions(video)[:3] for video in videos]
    tokens = [tokens_of(model, video)[:keep] for video, keep in zip(videos, (128, 1, 40), strict=True)]
    together, _ = answer_logits(model, tokens, rows_of(asked))
    apart = [answer_logits(model, [t], rows_of([q]))[0] for t, q in zip(tokens, asked, strict=True)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_question_does_not_see_the_one_before(model, videos):
    first, second, third = all_questions(videos[0])[:3]
    tokens = [tokens_of(model, videos[0])]
    behind, _ = answer_logits(model, tokens, rows_of([[first, third]]))
    other, _ = answer_logits(model, tokens, rows_of([[second, third]]))
    torch.testing.assert_close(behind[2:], other[2:], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(behind[:2], other[:2], atol=1e-5)


def test_what_generate_says_to_many_questions_is_what_the_rows_say():
    """Where nothing happens inside the language model, both ways to ask are one, and answers differ by question."""
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(WEIGHTS).eval()
    compress = Installed(model, {"retain_ratio": 0.5})
    said = []
    for video in (sample_video("test", seed) for seed in range(3)):
        asked = all_questions(video)
        tokens = compress(normalized(torch.from_numpy(video.frames()))).tokens
        logits, _ = answer_logits(model, [tokens], rows_of([asked]))
        assert generated(compress.model, tokens, asked) == logits[::2].argmax(-1).tolist()
        said += logits[::2].argmax(-1).tolist()
    assert len(set(said)) > 5


def test_generate_answers_with_tokens_left_out_inside_as_it_does_from_pixels(processor, videos):
    """With the video as pixels, each question alone; of the trained model, some of whose answers that changes."""
    trained = LlavaOnevisionForConditionalGeneration.from_pretrained(WEIGHTS).eval()
    compress = Installed(trained, {"retain_ratio": 1.0, "inner_layer": 1, "inner_drop_ratio": 0.95})
    changed = 0
    for video in videos[:2]:
        asked = all_questions(video)[:4]
        tokens = compress(normalized(torch.from_numpy(video.frames()))).tokens
        found = generated(compress.model, tokens, asked)
        alone = [inputs_for(processor, video, question) for question in asked]
        said = [compress.model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1] for inputs in alone]
        assert found == said
        logits, _ = answer_logits(trained, [tokens], rows_of([asked]))
        changed += found != logits[::2].argmax(-1).tolist()
    assert changed


def test_a_prompt_is_that_of_the_processor(processor, videos):
    for question in all_questions(videos[1]):
        assert inputs_for(processor, videos[1], question)["input_ids"][0].tolist() == prompt_ids(
            question, VIDEO_TOKENS + 1
        )
        assert prompt_length(question, 13) == len(prompt_ids(question, 14)) == len(prompt_ids(question, 0)) + 14


@torch.no_grad()
def test_kept_positions_are_those_of_all_tokens(model, videos):
    """A video that loses its first and last frames is answered as the whole one with these masked."""
    asked = [all_questions(videos[0])[:3]]
    tokens = tokens_of(model, videos[0])
    every = torch.arange(VIDEO_TOKENS)
    whole, _ = answer_logits(model, [tokens], rows_of(asked))
    torch.testing.assert_close(answer_logits(model, [tokens], rows_of(asked), [every])[0], whole)

    kept = every[20:100]
    question = asked[0][0]
    words = model.get_input_embeddings()(torch.tensor(prompt_ids(question, 1)))
    before = prompt_ids(question, 1).index(IDS["<video>"])
    rows = torch.cat([words[:before], tokens[kept], model.model.image_newline[None], words[before + 1 :]])
    places = torch.cat([torch.arange(before), before + kept, before + torch.arange(VIDEO_TOKENS, 200)])[: len(rows)]
    hidden = model.model.language_model(inputs_embeds=rows[None], position_ids=places[None]).last_hidden_state
    logits, _ = answer_logits(model, [tokens[kept]], rows_of(asked), [kept])
    torch.testing.assert_close(logits[0], model.lm_head(hidden[0, -1]), rtol=1e-4, atol=1e-5)
