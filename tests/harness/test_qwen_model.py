"""Checkpoints of Qwen inside lmms-eval's own evaluator: answers, batches, costs, and the table of ``eval --tasks``.

Skipped without lmms-eval; ``make test-eval`` has it.
"""

import json

import numpy as np
import pytest
from tiny_qwen_checkpoint import require_family, write_qwen_checkpoint

pytest.importorskip("lmms_eval.evaluator", reason="lmms-eval is not installed: make test-eval has it")
pytest.importorskip("torchvision", reason="Qwen's processors need torchvision")

from lmms_eval.api.instance import Instance  # noqa: E402
from PIL import Image  # noqa: E402

import earlytom_compile  # noqa: E402
from earlytom_compile.cli.main import main  # noqa: E402
from earlytom_compile.integrations.lmms_eval import model  # noqa: E402
from earlytom_compile.integrations.video import read_video  # noqa: E402
from earlytom_compile.toyworld.lmms_task import write_task  # noqa: E402
from earlytom_compile.toyworld.world import sample_video, write_mp4  # noqa: E402

EAGER = {"lowering": "eager"}
SHAPES = ("cpu-tiny-qwen2.5", "cpu-tiny-qwen3", "cpu-tiny-qwen3.5")
GREEDY = {"max_new_tokens": 5, "temperature": 0}
TEMPORAL = 2  # pictures of a temporal patch


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory):
    require_family(request.param)
    return write_qwen_checkpoint(tmp_path_factory.mktemp("qwen"), request.param)


@pytest.fixture(scope="module")
def loaded(folder):
    return model.EarlyTom(pretrained=str(folder), device="cpu", retain_ratio=None, max_frames_num=6)


@pytest.fixture
def harness(loaded):
    """The model with the class and options wanted; its weights are read once."""

    def made(kind=model.EarlyTom, batch_size=1, retain_ratio=None, **options):
        lm = object.__new__(kind)
        lm.__dict__.update(loaded.__dict__)
        lm.batch_size, lm.task_dict = batch_size, {}
        lm.use(retain_ratio, **({**EAGER, **options} if retain_ratio is not None else options))
        return lm

    yield made
    earlytom_compile.restore(loaded.model)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos") / "0.mp4"
    write_mp4(sample_video("test", 0), path, lossless=True)
    return str(path)


def pictures(seed, count, size=(140, 80)):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def asked(file):
    """A file; videos of other lengths and sizes; a picture beside one; a picture; nothing."""
    (beside,) = pictures(9, 1, (90, 48))
    return [
        ([file], "what happens in the video ?"),
        ([pictures(1, 5, (60, 100))], "who is it ?"),
        ([pictures(2, 4), pictures(3, 2)], "which of them ?"),
        ([pictures(4, 4), beside], "is it there ?"),
        ([beside], "what is it ?"),
        (None, "how many ?"),
    ]


def requests(documents, arguments=GREEDY, shown=lambda doc: doc[0], chat=False):
    of_task = (dict(arguments), shown) if not chat else (shown, dict(arguments))
    return [
        Instance(
            request_type="generate_until",
            arguments=(question, *of_task, place, "drawn", "test"),
            idx=0,
            metadata={"task": "drawn", "doc_id": place, "repeats": 1},
        )
        for place, (_, question) in enumerate(documents)
    ]


def answers(lm, documents, *given, **named):
    lm.task_dict = {"drawn": {"test": documents}}
    return [found.text for found in lm.generate_until(requests(documents, *given, **named))]


def own_inputs(lm, file, question, frames=6):
    """Of the checkpoint's own processor, from pixels at their full size."""
    read, processor = read_video(file, frames), lm._speaker._processor
    turn = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    told = {"total_num_frames": read.total, "fps": read.rate, "frames_indices": list(read.indices)}
    made = processor(
        text=prompt, videos=read.pixels, do_sample_frames=False, video_metadata=[told], return_tensors="pt"
    )
    return {name: value for name, value in made.items() if name != "video_metadata"}


@pytest.mark.parametrize("beams", [1, 2])
def test_answers_are_those_of_the_model_itself(harness, file, beams):
    lm, questions = harness(), ["what happens ?", "who is it, and where ?"]
    expected = []
    for question in questions:
        inputs = own_inputs(lm, file, question)
        output = lm.model.generate(**inputs, max_new_tokens=5, do_sample=False, num_beams=beams, pad_token_id=0)
        new = output[0, inputs["input_ids"].shape[1] :]
        expected.append(lm._speaker.tokenizer.decode(new, skip_special_tokens=True).strip())
    found = answers(lm, [([file], question) for question in questions], {**GREEDY, "num_beams": beams})
    assert found == expected and any(expected)


@pytest.mark.parametrize("ratio", [None, 0.25])
def test_batches_change_no_answer_and_no_order(harness, asked, ratio):
    alone = answers(harness(retain_ratio=ratio), asked)
    assert answers(harness(batch_size=6, retain_ratio=ratio), asked) == alone and len(set(alone)) > 1


def test_with_all_tokens_answers_are_the_full_models(harness, asked):
    videos = [document for document in asked if document[0]]
    assert answers(harness(retain_ratio=1.0), videos) == answers(harness(), videos)


def test_chat_tasks_give_the_answers_of_simple_ones(harness, file):
    documents = [([file], "what happens ?"), ([file], "who ?")]

    def messages(doc):
        return [{"role": "user", "content": [{"type": "video", "url": file}, {"type": "text", "text": doc[1]}]}]

    chat = answers(harness(model.EarlyTomChat, 2, 0.25), documents, shown=messages, chat=True)
    assert chat == answers(harness(retain_ratio=0.25), documents)


def test_costs_are_of_temporal_patches_and_of_the_tokens_of_each_size(harness, asked):
    videos = asked[:3]
    lm = harness(batch_size=3)
    samples = [lm._speaker.prepare(model.from_visuals(question, shown, {})) for shown, question in videos]
    sizes = [[len(video) * video.shape[1] // 4 for video in sample.videos] for sample in samples]
    assert len({size for of_one in sizes for size in of_one}) > 2, "the test must have videos of several sizes"
    answers(lm, videos)
    frames = [-(-count // TEMPORAL) for count in (6, 5, 4, 2)]
    full = lm.costs()
    assert full["video_frames"] == pytest.approx(sum(frames) / 3) and full["stage1_retention"] == 1
    assert full["video_tokens"] == full["video_tokens_kept"] == pytest.approx(sum(map(sum, sizes)) / 3)
    lm.use(0.25, **EAGER)
    answers(lm, videos)
    found, kept = lm.costs(), [sum(max(1, round(0.25 * size)) for size in of_one) for of_one in sizes]
    assert found["video_tokens_kept"] == pytest.approx(sum(kept) / 3)
    assert (found["video_frames"], found["video_tokens"]) == (full["video_frames"], full["video_tokens"])
    assert 0 < found["stage1_retention"] <= 1


def test_each_question_has_the_counts_of_its_own_videos(harness, asked):
    lm = harness(batch_size=3, retain_ratio=0.25)
    answers(lm, asked[:3])
    together, one = lm._costs._shown, harness(retain_ratio=0.25)
    answers(one, asked[:3])
    assert together == one._costs._shown and [shown.frames for shown in together] == [3, 3, 3]
    assert len({shown.tokens for shown in together}) == len({shown.kept for shown in together}) > 1


def test_the_table_of_eval_tasks(folder, tmp_path, capsys):
    write_task(tmp_path / "toyworld", videos=1)
    told = tmp_path / "table.json"
    words = ["eval", "--tasks", "toyworld", "--include-path", tmp_path / "toyworld", "--model", folder, "--limit", 2]
    more = ["--device", "cpu", "--frames", 8, "--retain-ratios", "0.25", "--json", told]
    status, said = main([str(word) for word in (*words, *more)]), capsys.readouterr()
    assert status == 0, said.err
    full, compressed = (each["costs"] for each in json.loads(told.read_text())["evaluations"])
    assert full["video_frames"] == compressed["video_frames"] == 4
    tokens = full["video_tokens"]
    assert tokens == full["video_tokens_kept"] and compressed["video_tokens_kept"] == round(0.25 * tokens)
    rows = json.loads(told.read_text())["rows"]
    assert [row["tflop"] for row in rows] == [None, None]
