"""The toy world as a task of lmms-eval: the questions and the pixels of ``earlytom eval --toy``, in files."""

import json
import runpy

import numpy as np
import pytest

from earlytom_compile.integrations.video import read_video
from earlytom_compile.toyworld import lmms_task
from earlytom_compile.toyworld.evaluate import load_questions
from earlytom_compile.toyworld.world import FILE_FRAMES, FRAMES

FIRST, VIDEOS = 3, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return lmms_task.write_task(tmp_path_factory.mktemp("task"), split="validation", first=FIRST, videos=VIDEOS)


def test_questions_and_answers_are_those_of_the_other_road(folder):
    expected = load_questions("validation", FIRST, VIDEOS)
    asked = [[each.text, each.answer, each.category] for questions in expected.asked for each in questions]
    found = json.loads((folder / "questions.json").read_text())
    assert [[each["question"], each["answer"], each["category"]] for each in found] == asked
    videos = [each["video"] for each in found]
    assert [videos.count(video) for video in dict.fromkeys(videos)] == list(map(len, expected.asked))


def test_files_decode_to_the_pixels_that_were_drawn(folder):
    found = json.loads((folder / "questions.json").read_text())
    expected = load_questions("validation", FIRST, VIDEOS).frames
    for path, frames in zip(dict.fromkeys(each["video"] for each in found), expected, strict=True):
        video = read_video(path, FRAMES)
        assert video.total == FILE_FRAMES and np.array_equal(video.pixels, frames.numpy())


def test_what_the_task_calls(folder):
    code = runpy.run_path(str(folder / "toyworld_task.py"))
    question = json.loads((folder / "questions.json").read_text())[0]
    assert code["doc_to_visual"](question) == [question["video"]]
    assert code["doc_to_text"](question) == question["question"]
    for said, score in ((question["answer"], 1.0), (f" {question['answer']}\n", 1.0), ("nothing", 0.0), ("", 0.0)):
        assert code["process_results"](question, [said]) == {lmms_task.METRIC: score}


def test_the_program(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lmms_task", "--output", str(tmp_path / "new" / "task"), "--videos", "1"])
    lmms_task.main()
    assert f"in {tmp_path / 'new' / 'task'}" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "new" / "task").iterdir()) == [
        "questions.json",
        "toyworld.yaml",
        "toyworld_task.py",
        "videos",
    ]
