"""The models inside lmms-eval's own evaluator, in this process: answers, batches, costs, what is refused.

Skipped without lmms-eval; ``make test-eval`` has it.
"""

import logging
import sys
import time

import numpy as np
import pytest
import torch
from films import write_film

pytest.importorskip("lmms_eval.evaluator", reason="lmms-eval is not installed: make test-eval has it")

from lmms_eval.api.instance import Instance  # noqa: E402
from PIL import Image  # noqa: E402

import earlytom_compile  # noqa: E402
from earlytom_compile import EarlyTomConfigError  # noqa: E402
from earlytom_compile.integrations.lmms_eval import manifests, model  # noqa: E402
from earlytom_compile.integrations.video import read_video  # noqa: E402
from earlytom_compile.toyworld.model import WEIGHTS  # noqa: E402
from earlytom_compile.toyworld.questions import ask  # noqa: E402
from earlytom_compile.toyworld.world import rng_of, sample_video, write_mp4  # noqa: E402
from earlytom_compile.words import what_ended  # noqa: E402

EAGER = {"lowering": "eager", "variant": "plus"}
GREEDY = {"max_new_tokens": 4, "temperature": 0}
TOKENS = 128


def loaded(kind=model.EarlyTom, **given):
    return kind(pretrained=str(WEIGHTS), device="cpu", **{"retain_ratio": None, **given})


@pytest.fixture(scope="module")
def one_model():
    return loaded(batch_size="4")


@pytest.fixture
def harness(one_model):
    """A model of the class and options wanted, around weights that are read once."""

    def made(kind=model.EarlyTom, batch_size=1, retain_ratio=None, **options):
        lm = object.__new__(kind)
        lm.__dict__.update(one_model.__dict__)
        lm.batch_size, lm.task_dict = batch_size, {}
        lm.use(retain_ratio, **({**EAGER, **options} if retain_ratio is not None else options))
        return lm

    yield made
    earlytom_compile.restore(one_model.model)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Documents of the toy world with a video file each: (path, question, answer)."""
    folder, documents = tmp_path_factory.mktemp("videos"), []
    for seed in range(3):
        video, path = sample_video("test", seed), folder / f"{seed}.mp4"
        write_mp4(video, path, lossless=True)
        documents += [(str(path), each.text, each.answer) for each in ask(video, rng_of("test", seed, 3)).values()]
    return documents


def simple(documents, arguments=GREEDY, metadata=()):
    """Requests of a simple task; a document is (what is shown, question)."""
    return [
        Instance(
            request_type="generate_until",
            arguments=(question, dict(arguments), lambda doc: doc[0], place, "drawn", "test"),
            idx=0,
            metadata={"task": "drawn", "doc_id": place, "repeats": 1, **dict(metadata)},
        )
        for place, (_, question, *_) in enumerate(documents)
    ]


def answers(lm, documents, arguments=GREEDY, metadata=()):
    lm.task_dict = {"drawn": {"test": documents}}
    return [found.text for found in lm.generate_until(simple(documents, arguments, metadata))]


def frames(seed, count):
    drawn = sample_video("test", seed).frames()
    return [Image.fromarray(frame) for frame in np.asarray(drawn)[:count]]


def own_answer(lm, pixels, question):
    """Of the model itself, by its own processor's tokens: pixels uint8 [F, 96, 96, 3]."""
    tokenizer = lm._speaker.tokenizer
    text = f"<|im_start|> user <video> {question} <|im_end|> <|im_start|> assistant"
    text = text.replace("<video>", "<video>" * (16 * len(pixels) + 1))
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    videos = torch.from_numpy(pixels).permute(0, 3, 1, 2)[None] / 127.5 - 1
    output = lm.model.generate(input_ids=ids, pixel_values_videos=videos, max_new_tokens=4, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_the_models_are_found_by_their_names():
    from lmms_eval import models

    names = {manifest.model_id for manifest in manifests()}
    assert names == {"earlytom", "earlytom_llava_onevision_hf", "earlytom_llava_onevision"}
    for name in names:
        assert models.get_model(name, force_simple=True).is_simple
        assert not models.get_model(name).is_simple


def test_answers_are_those_of_the_model_itself(harness, asked):
    lm = harness()
    pixels = {path: np.stack(frames(seed, 8)) for seed, path in enumerate(dict.fromkeys(path for path, *_ in asked))}
    expected = [own_answer(lm, pixels[path], question) for path, question, _ in asked]
    assert answers(lm, asked) == expected and len(set(expected)) > 3


@pytest.mark.parametrize("ratio", [None, 0.1])
def test_batches_change_no_answer_and_no_order(harness, asked, ratio):
    documents = [*asked, (None, "how many things are in the video ?"), (frames(1, 5), "what color is the ring ?")]
    metadata = {"task_type": "video", "sample_frames": 8}
    shown = [(None if video is None else [video], question) for video, question, *_ in documents]
    one = answers(harness(batch_size=1, retain_ratio=ratio), shown)
    assert answers(harness(batch_size=4, retain_ratio=ratio), shown) == one
    assert one[-1] == answers(harness(retain_ratio=ratio), [(frames(1, 5), shown[-1][1])], metadata=metadata)[0]


def test_several_videos_of_different_lengths_in_a_prompt(harness):
    shown = [([frames(0, 8), frames(1, 5)], "what color is the ring ?")]
    lm = harness(retain_ratio=0.25)
    assert answers(lm, shown)[0]
    costs = lm.costs()
    assert (costs["video_frames"], costs["video_tokens"]) == (13, 13 * 16)
    assert costs["video_tokens_kept"] == round(0.25 * 8 * 16) + round(0.25 * 5 * 16)
    with pytest.raises(model.SampleError, match=r"document 0: .*one length.* \(8, 5\) frames: give max_frames_num=5"):
        answers(harness(), shown)


def test_pictures_go_through_the_processor(harness):
    shown = [([frames(0, 1)[0]], "what color is the ring ?"), (frames(0, 2), "what color is the ring ?")]
    lm = harness(batch_size=2, retain_ratio=0.1)
    assert len(answers(lm, shown)) == 2 and set(lm.costs()) == {"retain_ratio", "ttft_ms"}


def test_chat_tasks_give_the_answers_of_simple_ones(harness, asked):
    lm = harness(model.EarlyTomChat, batch_size=3, retain_ratio=0.25)
    lm.task_dict = {"drawn": {"test": asked}}

    def messages(doc):
        content = [{"type": "video", "url": doc[0]}, {"type": "text", "text": doc[1]}]
        return [{"role": "user", "content": content}]

    requests = [
        Instance(
            request_type="generate_until",
            arguments=("not used", messages, dict(GREEDY), place, "drawn", "test"),
            idx=0,
            metadata={"task": "drawn", "doc_id": place, "repeats": 1},
        )
        for place in range(len(asked))
    ]
    assert [found.text for found in lm.generate_until(requests)] == answers(harness(retain_ratio=0.25), asked)


def test_generation_arguments_are_obeyed(harness, asked):
    few = asked[:3]
    lm = harness(batch_size=3)
    plain = [found.split() for found in answers(lm, few, {"max_new_tokens": 1})]
    assert all(len(words) == 1 for words in plain)
    stop = plain[0][0]
    stopped = answers(lm, few, {"max_new_tokens": 4, "until": [stop]})
    assert stopped[0] == "" and stopped != plain
    beams = {"max_new_tokens": 4, "num_beams": 2}
    assert len(answers(lm, few, beams)) == 3
    with pytest.raises(model.SampleError, match="document 0.*min_p=0.1, which is not known"):
        answers(lm, few, {"min_p": 0.1})


def test_requests_with_different_arguments_are_answered_each_with_its_own(harness, asked):
    lm = harness(batch_size=4)
    lm.task_dict = {"drawn": {"test": asked[:4]}}
    stop = answers(lm, asked[:1])[0]
    lm.task_dict = {"drawn": {"test": asked[:4]}}
    requests = [
        request
        for place, arguments in enumerate([GREEDY, {**GREEDY, "until": [stop]}, GREEDY, GREEDY])
        for request in simple([asked[0]], arguments)
        if request.args[3] == 0 or place
    ]
    assert [found.text for found in lm.generate_until(requests)] == [stop, "", stop, stop]


def test_the_full_model_is_restored_exactly_and_costs_begin_anew(harness, asked):
    lm = harness()
    full, attributes = answers(lm, asked[:4]), set(lm.model.__dict__)
    assert lm.costs()["retain_ratio"] == 1.0 and lm.costs()["stage1_retention"] == 1.0
    assert lm.costs()["video_tokens_kept"] == lm.costs()["video_tokens"] == TOKENS
    for ratio in (0.1, 0.25):
        lm.use(ratio, **EAGER)
        assert lm.costs() == {"retain_ratio": ratio}
        answers(lm, asked[:4])
        assert lm.costs()["video_tokens_kept"] == round(ratio * TOKENS) and lm.costs()["video_frames"] == 8
    lm.use(None)
    assert set(lm.model.__dict__) == attributes and answers(lm, asked[:4]) == full


def test_costs_are_of_what_was_merged_and_measured(harness, asked):
    lm = harness(retain_ratio=0.1, variant="paper")
    answers(lm, asked)
    costs, share = lm.costs(), {}
    for path in {path for path, *_ in asked}:
        pixels = torch.from_numpy(read_video(path, 8).pixels).permute(0, 3, 1, 2)[None] / 127.5 - 1
        (observed,) = earlytom_compile.observe(lm.model, pixels, variant="paper")
        share[path] = observed.frame_counts[-1] / observed.frame_counts[0]
    mean = np.mean([share[path] for path, *_ in asked])
    assert costs["stage1_retention"] == pytest.approx(mean) and mean < 1
    assert costs["frames_per_second"] == pytest.approx(1000 * 8 / costs["ttft_ms"])


def test_a_call_that_compiles_is_timed_once_more_and_others_are_not(harness, asked, monkeypatch):
    lm = harness(retain_ratio=0.1)
    calls, timed = [], lm._timed
    monkeypatch.setattr(lm, "_timed", lambda *given: calls.append(given) or timed(*given), raising=False)
    answers(lm, asked[:4])
    assert len(calls) == 5 and calls[0] == calls[1]
    answers(lm, asked[:4])
    assert len(calls) == 9
    lm.use(None)
    answers(lm, asked[:2])
    assert len(calls) == 12


def test_the_encoder_is_part_of_the_time_to_the_first_token(harness, asked):
    lm = harness()
    slept = 0.2
    hook = lm.model.model.vision_tower.register_forward_pre_hook(lambda *given: time.sleep(slept))
    try:
        answers(lm, asked[:2])
    finally:
        hook.remove()
    assert lm.costs()["ttft_ms"] > 1000 * slept


def test_a_sample_that_cannot_be_read_is_named(harness, asked, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all")
    documents = [*asked[:2], (str(broken), "what color is the ring ?"), *asked[2:4]]
    for size in (1, 4):
        with pytest.raises(model.SampleError, match=f"task drawn, document 2: '{broken}'"):
            answers(harness(batch_size=size, retain_ratio=0.1), documents)


def test_a_task_that_ends_the_process_is_an_error_of_the_sample(harness):
    lm = harness()
    lm.task_dict = {"drawn": {"test": [None]}}
    (request,) = simple([(None, "what ?")])
    request.arguments = ("what ?", GREEDY, lambda doc: sys.exit("video path:x.mp4 does not exist"), 0, "drawn", "test")
    says = "document 0: the task ended the process: video path:x.mp4 does not exist"
    with pytest.raises(model.SampleError, match=says):
        lm.generate_until([request])


@pytest.mark.parametrize("code, says", [(0, ""), (None, ""), (3, " with exit code 3"), ("no file", ": no file")])
def test_an_exit_reads_as_one(code, says):
    assert what_ended(SystemExit(code)) == f"the task ended the process{says}"


@pytest.mark.parametrize("nothing", [None, []])
def test_a_question_with_nothing_shown_among_others_is_told_of_once(harness, asked, caplog, nothing):
    documents = [*asked[:2], (nothing, "what color is the ring ?"), asked[2], (nothing, "how many ?")]
    lm = harness(batch_size=2, retain_ratio=0.1)
    assert len(answers(lm, documents)) == 5
    (told,) = [record.getMessage() for record in caplog.records if "no picture and no video" in record.getMessage()]
    assert told.startswith("task drawn, document 2, 4: no picture and no video with 2 questions of 5")
    caplog.clear()
    answers(lm, asked[:2])
    answers(lm, [(nothing, "how many ?")] * 2)
    assert not caplog.records


def test_of_many_questions_with_nothing_shown_some_are_named(harness, asked, caplog):
    answers(harness(batch_size=4), [asked[0], *[(None, "how many ?")] * 25])
    numbers = ", ".join(map(str, range(1, 21)))
    assert f"task drawn, document {numbers} and 5 more: no picture and no video with 25 questions" in caplog.text


def test_messages_of_chat_tasks_with_nothing_shown_are_told_of(harness, asked, caplog):
    lm = harness(model.EarlyTomChat)
    lm.task_dict = {"drawn": {"test": asked}}

    def messages(doc):
        video = [{"type": "video", "url": doc[0]}] if doc is not asked[1] else []
        return [{"role": "user", "content": [*video, {"type": "text", "text": doc[1]}]}]

    requests = simple(asked[:3])
    for request in requests:
        question, arguments, _, *place = request.args
        request.arguments = (question, messages, arguments, *place)
    assert len(lm.generate_until(requests)) == 3
    assert "task drawn, document 1: no picture and no video with 1 question of 3" in caplog.text


def test_an_error_in_a_call_names_its_samples(harness, asked, monkeypatch):
    lm = harness(batch_size=2)

    def fails(*given, **named):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(lm.model, "generate", fails, raising=False)
    with pytest.raises(model.SampleError, match="task drawn, document 0, 1: OutOfMemoryError: no memory left"):
        answers(lm, asked[:4])


def test_what_is_wrong_with_a_video_that_can_be_read_is_said(harness, asked, tmp_path, caplog):
    cut = write_film(tmp_path / "cut.mkv", 40)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with caplog.at_level(logging.WARNING):
        answers(harness(), [(str(cut), "what color is the ring ?")])
    assert "task drawn, document 0: " in caplog.text and "cut.mkv' breaks off" in caplog.text


def test_a_call_that_would_run_uncompressed_is_an_error(harness, asked, monkeypatch):
    lm = harness(retain_ratio=0.1)
    few = {**GREEDY, "num_beams": 1}
    monkeypatch.setattr(lm.model.generation_config, "prompt_lookup_num_tokens", 3, raising=False)
    with pytest.raises(model.SampleError, match="assisted decoding"):
        answers(lm, asked[:1], few)
    lm.use(0.1, strict=False, **EAGER)
    answers(lm, asked[:1], few)
    assert lm.costs()["video_tokens_kept"] == TOKENS


@pytest.mark.parametrize("method", ["loglikelihood", "generate_until_multi_round"])
def test_what_is_not_there_says_so(harness, method):
    with pytest.raises(NotImplementedError, match=f"EarlyTom has no {method}: take tasks"):
        getattr(harness(), method)([])


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    for kind in (model.EarlyTomLlavaOnevisionHf, model.EarlyTomLlavaOnevisionHfChat):
        with pytest.raises(EarlyTomConfigError, match="'qwen2_vl', and this model takes 'llava_onevision'"):
            kind(pretrained=str(tmp_path))
    assert loaded(model.EarlyTomLlavaOnevisionHf).model is not None


def test_a_model_made_by_name_ends_the_process(asked, capsys):
    with pytest.raises(SystemExit, match="error: unknown option 'ratio'.*Valid options: pretrained"):
        model.EarlyTom.create_from_arg_string(f"pretrained={WEIGHTS},ratio=0.1")
    with pytest.raises(SystemExit, match="batch_size is given twice: batch_size=2 in --model_args, and 1 by"):
        model.EarlyTom.create_from_arg_string(f"pretrained={WEIGHTS},batch_size=2", {"batch_size": 1, "device": None})
    arguments = f"pretrained={WEIGHTS},device=cpu,retain_ratio=full"
    lm = model.EarlyTom.create_from_arg_string(arguments, {"batch_size": "1", "device": None})
    with pytest.raises(SystemExit, match="error: task drawn, document 0: no video file at 'nowhere.mp4'"):
        answers(lm, [("nowhere.mp4", "what ?")])
    with pytest.raises(SystemExit, match="has no loglikelihood"):
        lm.loglikelihood([])
    assert "Traceback" in capsys.readouterr().err
