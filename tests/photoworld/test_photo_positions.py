"""Kept positions beside new ones: each answer as if it were asked alone, of the tokens that plus selects."""

import pytest
import torch
from pools import tiny_model
from test_photo_train import alone

from earlytom_compile import reference
from earlytom_compile.photoworld import positions
from earlytom_compile.photoworld.language import IDS
from earlytom_compile.photoworld.model import VIDEO_TOKENS, save
from earlytom_compile.photoworld.pool import TOKENS
from earlytom_compile.photoworld.questions import all_questions
from earlytom_compile.photoworld.story import story_of
from earlytom_compile.photoworld.world import FRAMES

RATIO = 0.1


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(positions, "all_questions", lambda story: all_questions(story)[:5])


@torch.no_grad()
def test_answers_are_those_of_each_question_alone(pools):
    model, pool = tiny_model(seed=1), pools[1]
    right, asked = positions.answered(model, pool, RATIO)
    assert asked.tolist() == [5, 5]
    for number, video in enumerate(pool.clips):
        features = torch.from_numpy(pool.tokens(range(pool.first[number], pool.first[number + 1]), None)).float()
        frames = model.model.multi_modal_projector(features).mean(1).view(FRAMES, TOKENS, -1)
        kept = reference.select_representatives(frames, frames_in=FRAMES, retain_ratio=RATIO)
        places, tokens = kept[:, 0] * TOKENS + kept[:, 1], frames[kept[:, 0], kept[:, 1]]
        assert len(places) == round(RATIO * VIDEO_TOKENS)
        questions = all_questions(story_of(video))[:5]
        for way, (at, end) in enumerate([(places, VIDEO_TOKENS), (torch.arange(len(places)), len(places))]):
            said = [alone(model, tokens, at, question, end).argmax().item() for question in questions]
            assert right[number, way] == sum(word == IDS[q.answer] for word, q in zip(said, questions, strict=True))


def test_the_command(pools, tmp_path, monkeypatch, capsys):
    model = tiny_model(seed=1)
    save(model, tmp_path / "model")
    monkeypatch.setattr(positions, "load", lambda folder: model)
    monkeypatch.setattr(positions, "Pool", lambda folder, split, count: pools[1])
    positions.main(["--pool", str(tmp_path), "--model", str(tmp_path / "model")])
    lines = [line for line in capsys.readouterr().out.splitlines() if "%" in line and "│" in line]
    assert [line.split()[1] for line in lines] == ["100%", "25%", "10%", "5%"]
    everything = lines[0].split("│")
    assert everything[2].strip() == everything[3].strip(), "all tokens have the same positions either way"
