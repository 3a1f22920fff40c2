"""Training: a run goes on where it stopped, and its checkpoint is the model that was trained."""

import json

import pytest
import torch
from pools import tiny_model

from earlytom_compile.errors import EarlyTomConfigError
from earlytom_compile.photoworld import train
from earlytom_compile.photoworld.answers import answer_logits, rows_of
from earlytom_compile.photoworld.language import AFTER, BEFORE, END, IDS
from earlytom_compile.photoworld.model import VIDEO_TOKENS, build_model, load, save
from earlytom_compile.photoworld.questions import CATEGORIES, all_questions
from earlytom_compile.photoworld.story import story_of
from earlytom_compile.photoworld.train import Phase
from earlytom_compile.photoworld.world import sample_video

EVENLY = (1.0,) * len(CATEGORIES)
PHASES = (
    Phase("tokens", 2, 4, 1e-3),
    Phase("some", 2, 2, 1e-3, EVENLY, drop=1.0, most=0.1),
    Phase("things", 1, 2, 1e-3, EVENLY, drop=1.0, most=0.1, things=True),
    Phase("whole", 1, 1, 1e-3, EVENLY, drop=0.0),
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    monkeypatch.setattr(train, "build_model", lambda seed: build_model(seed, vision_layers=1, text_layers=1))


def tower():
    return tiny_model(seed=8).model.vision_tower


def weights(folder):
    return load(folder, tower).state_dict()


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


class Stopped(Exception):
    """Somebody pulled the plug."""


def test_a_run_that_was_stopped_ends_as_one_that_was_not(pools, tmp_path, monkeypatch):
    whole = train.train(tmp_path / "whole", *pools, 4, PHASES, cpu=True)
    save_state, saved = train.Run.save, []

    def stopping(run):
        save_state(run)
        saved.append(run.step)
        if len(saved) in (2, 5):
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "save", stopping)
        for _ in range(2):
            with pytest.raises(Stopped):
                train.train(tmp_path / "stopped", *pools, 4, PHASES, cpu=True)
    stopped = train.train(tmp_path / "stopped", *pools, 4, PHASES, cpu=True)
    one, other = weights(whole), weights(stopped)
    assert all(torch.equal(one[name], other[name]) for name in one)
    losses = [[line for line in history(tmp_path / name) if "clips" not in line] for name in ("whole", "stopped")]
    assert losses[0] == losses[1]
    checks = [line["validation"] for line in losses[0] if "validation" in line]
    assert len(checks) == 3 and set(checks[0]) == {"overall", *CATEGORIES}


def test_a_checkpoint_has_all_weights_but_the_encoders(tmp_path):
    model = tiny_model(seed=3)
    save(model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 3_000_000
    loaded, encoder = load(tmp_path, tower).state_dict(), tower().state_dict()
    for name, value in model.state_dict().items():
        inside = name.removeprefix("model.vision_tower.")
        assert torch.equal(loaded[name], encoder[inside] if inside != name else value)


def test_a_checkpoint_without_some_weights_is_refused(tmp_path):
    save(build_model(0, vision_layers=1, text_layers=1), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 2
    config["text_config"]["layer_types"] = ["full_attention"] * 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EarlyTomConfigError, match="does not hold the weights"):
        load(tmp_path, tower)


def alone(model, tokens, places, question, end=VIDEO_TOKENS):
    """What the language model says behind one prompt; ``end``: the position of the newline behind the video."""
    words = model.get_input_embeddings()
    ids = torch.tensor([IDS[word] for word in (*question.text.split(), *AFTER)])
    before = words(torch.tensor([IDS[word] for word in BEFORE]))
    row = torch.cat([before, tokens, model.model.image_newline[None], words(ids)])
    behind = torch.arange(end, end + 1 + len(ids))
    positions = [torch.arange(len(before)), len(before) + places, len(before) + behind]
    hidden = model.model.language_model(
        inputs_embeds=row[None], position_ids=torch.cat(positions)[None]
    ).last_hidden_state
    return model.lm_head(hidden[0, -1])


@torch.no_grad()
@pytest.mark.parametrize("kept", [40, None])
def test_rows_are_answered_as_each_question_alone(kept):
    model, video = tiny_model(), sample_video("test", 3)
    asked = all_questions(story_of(video))[:3]
    places = torch.arange(VIDEO_TOKENS)[:: VIDEO_TOKENS // (kept or VIDEO_TOKENS)][:kept]
    tokens = torch.randn(len(places), model.config.text_config.hidden_size)
    logits, labels = answer_logits(model, [tokens], rows_of([asked]), [places] if kept else None)
    expected = torch.stack([alone(model, tokens, places, question) for question in asked])
    torch.testing.assert_close(logits[::2], expected, rtol=1e-4, atol=1e-4)
    assert labels.tolist() == [label for question in asked for label in (IDS[question.answer], END)]
