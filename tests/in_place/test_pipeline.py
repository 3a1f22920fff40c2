"""transformers' pipelines with a compiled model and video files: answers, tokens, and nothing lost at r = 1."""

import pytest
import torch
from films import write_film
from generating import share_vision_paths
from tiny_qwen_checkpoint import require_family, write_qwen_checkpoint
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import earlytom_compile
from earlytom_compile import EarlyTomConfigError, report
from earlytom_compile.cli.demo import write_demo_video
from earlytom_compile.integrations.preprocess import VideoTextProcessor
from earlytom_compile.integrations.video import read_video
from earlytom_compile.toyworld.model import VIDEO_TOKENS, WEIGHTS

TASKS = ("image-text-to-text", "any-to-any")
PLUS = {"retain_ratio": 0.1, "lowering": "eager"}  # the default
NOTHING_LOST = {
    "variant": "paper",
    "retain_ratio": 1.0,
    "tau_seg": -1.0,
    "tau_merge": 1.0,
    "reuse": False,
    "lowering": "eager",
}
NEW = {"max_new_tokens": 8, "do_sample": False}
# Many a token may come next, and a small difference leads elsewhere.
DRAWN = {"min_new_tokens": 40, "max_new_tokens": 40, "do_sample": True, "temperature": 3.0, "top_k": 0}


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A file and what is asked about it, with the true answers."""
    path = tmp_path_factory.mktemp("film") / "clip.mp4"
    return path, write_demo_video(path)


@pytest.fixture(scope="module")
def trained():
    return AutoModelForImageTextToText.from_pretrained(WEIGHTS).eval()


@pytest.fixture
def model(trained, one_trace, monkeypatch):
    share_vision_paths(one_trace, monkeypatch)
    yield trained
    earlytom_compile.restore(trained)


@pytest.fixture(scope="module")
def reads_files():
    """The stand-in for transformers' processor, which reads with PyAV."""
    return VideoTextProcessor.from_pretrained(str(WEIGHTS))


@pytest.fixture(scope="module")
def own_processor():
    pytest.importorskip("torchvision", reason="transformers' own processor needs torchvision for videos")
    return AutoProcessor.from_pretrained(WEIGHTS)


def chat(question, **video):
    return [{"role": "user", "content": [{"type": "video", **video}, {"type": "text", "text": question}]}]


def inputs_of(processor, conversation, **options):
    return processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    )


def ids_from(answering, conversation, prompt, generate=NEW, **options):
    """Token ids that a pipeline generates; it returns them behind the prompt's."""
    torch.manual_seed(0)
    (answer,) = answering(text=conversation, return_tensors=True, generate_kwargs=generate, **options)
    assert torch.equal(answer["generated_token_ids"][: len(prompt)], prompt)
    return answer["generated_token_ids"][len(prompt) :]


def words_from(answering, conversation):
    (answer,) = answering(text=conversation, return_full_text=False, generate_kwargs=NEW)
    return answer["generated_text"].strip()


def assert_same_as_generate(answering, conversation, generate=NEW, **options):
    """And that it compressed; returns the tokens of the prompt, as they are and as the language model got them."""
    inputs = inputs_of(answering.processor, conversation, **options)
    prompt = inputs["input_ids"][0]
    got = ids_from(answering, conversation, prompt, generate, **options)
    told = report(answering.model).to_dict()
    assert told["last_call"] == "compressed"
    torch.manual_seed(0)
    assert torch.equal(got, answering.model.generate(**inputs, **generate)[0, len(prompt) :])
    assert told["prompt"][0] == len(prompt)
    return told["prompt"]


@torch.no_grad()
def test_questions_about_a_file(model, reads_files, film):
    path, questions = film
    earlytom_compile.compile(model, **PLUS)
    for task, asked in zip(TASKS, (questions, questions[:1]), strict=True):
        answering = pipeline(task, model=model, processor=reads_files)
        for question in asked:
            conversation = chat(question.text, path=str(path))
            before, after = assert_same_as_generate(answering, conversation)
            assert before - after == VIDEO_TOKENS - 13  # a tenth of 128
            assert words_from(answering, conversation) == question.answer


@torch.no_grad()
def test_nothing_is_lost_where_everything_is_kept(model, reads_files, film):
    path, questions = film
    conversation = chat(questions[0].text, path=str(path))
    prompt = inputs_of(reads_files, conversation)["input_ids"][0]
    both = [pipeline(task, model=model, processor=reads_files) for task in TASKS]
    wanted = [ids_from(answering, conversation, prompt, DRAWN) for answering in both]
    assert torch.equal(*wanted) and len(set(wanted[0].tolist())) > 10

    earlytom_compile.compile(model, **NOTHING_LOST)
    for answering in both:
        assert torch.equal(ids_from(answering, conversation, prompt, DRAWN), wanted[0])
        told = report(model).to_dict()
        assert told["last_call"] == "compressed" and told["prompt"] == [len(prompt)] * 2
    earlytom_compile.compile(model, **NOTHING_LOST | {"retain_ratio": 0.1})
    for answering in both:
        assert not torch.equal(ids_from(answering, conversation, prompt, DRAWN), wanted[0])


@torch.no_grad()
def test_several_conversations_and_one_without_a_video(model, reads_files, film):
    path, questions = film
    text = [{"role": "user", "content": [{"type": "text", "text": questions[0].text}]}]
    conversations = [chat(question.text, path=str(path)) for question in questions]
    for task in TASKS:
        answering = pipeline(task, model=earlytom_compile.compile(model, **PLUS), processor=reads_files)
        answers = answering(text=conversations, return_full_text=False, generate_kwargs=NEW)
        assert [answer["generated_text"].strip() for (answer,) in answers] == [each.answer for each in questions]
        assert report(model).last_call == "compressed"
        answer = words_from(answering, text)
        assert report(model).last_call != "compressed"
        earlytom_compile.restore(model)
        assert words_from(answering, text) == answer


@torch.no_grad()
def test_frames_with_transformers_own_processor(model, own_processor, film):
    path, questions = film
    earlytom_compile.compile(model, **PLUS)
    frames = read_video(path, 8).pixels
    for task, asked in zip(TASKS, (questions, questions[:1]), strict=True):
        answering = pipeline(task, model=model, processor=own_processor)
        for question in asked:
            conversation = chat(question.text, video=frames)
            before, after = assert_same_as_generate(answering, conversation)
            assert before - after == VIDEO_TOKENS - 13
            assert words_from(answering, conversation) == question.answer


@torch.no_grad()
def test_a_path_with_transformers_own_processor(model, own_processor, film):
    """transformers reads files with torchcodec, and torchcodec with an FFmpeg that is installed beside it."""
    torchcodec = pytest.importorskip("torchcodec", reason="transformers reads files with torchcodec only")
    if getattr(torchcodec, "ffmpeg_major_version", True) is None:
        pytest.skip("torchcodec found no FFmpeg to read files with")
    path, questions = film
    earlytom_compile.compile(model, **PLUS)
    for task in TASKS:
        answering = pipeline(task, model=model, processor=own_processor)
        before, after = assert_same_as_generate(
            answering, chat(questions[0].text, path=str(path)), processor_kwargs={"num_frames": 8}
        )
        assert before - after == VIDEO_TOKENS - 13


def test_text_is_all_that_comes_of_any_to_any(reads_files):
    ids = reads_files.tokenizer("cross", return_tensors="pt")["input_ids"]
    assert reads_files.post_process_multimodal_output(ids, generation_mode="text") == ["cross"]
    with pytest.raises(EarlyTomConfigError, match="generation_mode='audio': must be \"text\""):
        reads_files.post_process_multimodal_output(ids, generation_mode="audio")


@pytest.mark.long
@torch.no_grad()
def test_qwen(tmp_path, one_trace, monkeypatch):
    pytest.importorskip("torchvision", reason="Qwen's processors need torchvision")
    require_family("cpu-tiny-qwen2.5")
    share_vision_paths(one_trace, monkeypatch)
    folder = write_qwen_checkpoint(tmp_path / "qwen", "cpu-tiny-qwen2.5")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    film = read_video(write_film(tmp_path / "film.mp4", 40), 8)
    told = {"total_num_frames": film.total, "fps": film.rate, "frames_indices": list(film.indices)}
    options = {"processor_kwargs": {"do_sample_frames": False, "video_metadata": [told]}}
    conversation = chat("what happens ?", video=film.pixels)
    prompt = inputs_of(processor, conversation, **options)["input_ids"][0]
    placeholders = int((prompt == model.config.video_token_id).sum())
    both = [pipeline(task, model=model, processor=processor) for task in TASKS]
    wanted = ids_from(both[0], conversation, prompt, DRAWN, **options)

    earlytom_compile.compile(model, **NOTHING_LOST)
    for answering in both:
        assert torch.equal(ids_from(answering, conversation, prompt, DRAWN, **options), wanted)
    earlytom_compile.compile(model, **PLUS | {"retain_ratio": 0.25})
    for answering in both:
        before, after = assert_same_as_generate(answering, conversation, DRAWN, **options)
        assert before - after == placeholders - -(-placeholders // 4)
        assert not torch.equal(ids_from(answering, conversation, prompt, DRAWN, **options), wanted)
