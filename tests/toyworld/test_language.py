"""Everything that is said has a token, and the prompt is what the checkpoint's own processor makes of it."""

import pytest

from earlytom_compile.integrations.preprocess import conversation, load_processor
from earlytom_compile.toyworld.language import SPECIAL_TOKENS, WORDS, build_tokenizer, prompt
from earlytom_compile.toyworld.model import build_model, save
from earlytom_compile.toyworld.questions import all_questions
from earlytom_compile.toyworld.world import SPLITS, sample_video


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return load_processor(str(save(build_model(0), tmp_path_factory.mktemp("toy"))))


@pytest.fixture(scope="module")
def questions():
    return [q for split in SPLITS for seed in range(300) for q in all_questions(sample_video(split, seed))]


def test_words_have_ids_of_their_own(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert len(vocabulary) == len(tokenizer) <= 200
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert [vocabulary[token] for token in (*SPECIAL_TOKENS, *WORDS)] == list(range(len(vocabulary)))


def test_every_word_of_every_question_and_answer_is_known(tokenizer, questions):
    for text in {f"{q.text} {answer}" for q in questions for answer in (q.answer, *q.choices)}:
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split())
        assert tokenizer.unk_token_id not in ids, text


def test_an_answer_is_one_token(tokenizer, questions):
    for answer in {choice for q in questions for choice in q.choices}:
        assert len(tokenizer(answer).input_ids) == 1


def test_other_words_are_unknown(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("what is a teapot ?").input_ids) == [
        "what", "is", "<unk>", "<unk>", "?",
    ]  # fmt: skip


def test_tokens_read_back_as_the_text(tokenizer, questions):
    for text in {prompt(q.text) for q in questions}:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_prompt_is_what_the_chat_template_writes(processor, questions):
    for text in sorted({q.text for q in questions})[::20]:
        assert prompt(text) == processor.apply_chat_template(conversation(text), add_generation_prompt=True)


def test_the_saved_tokenizer_is_the_same(processor, tokenizer, questions):
    texts = [prompt(q.text) for q in questions[::50]]
    assert processor.tokenizer(texts).input_ids == tokenizer(texts).input_ids
    assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_answers_end_with_the_token_that_ends_generation(processor, tokenizer):
    model = build_model(0)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id == end == model.config.text_config.eos_token_id
    assert tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert tokenizer.convert_tokens_to_ids("<video>") == model.config.video_token_id


def test_earlier_turns_are_closed(processor):
    turns = [*conversation("which way ?"), {"role": "assistant", "content": [{"type": "text", "text": "left"}]}]
    assert processor.apply_chat_template(turns) == (
        "<|im_start|> user <video> which way ? <|im_end|> <|im_start|> assistant left <|im_end|> "
    )
