"""The training script: losses fall, a run goes on where it stopped, the checkpoint is one that loads."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration

from earlytom_compile.toyworld import train
from earlytom_compile.toyworld.batches import patch_batch, question_batch
from earlytom_compile.toyworld.model import build_model
from earlytom_compile.toyworld.questions import CATEGORIES
from earlytom_compile.toyworld.train import AnswerTrainee, PatchTrainee, Phase

SHORT = (
    Phase("patches", 3, 2, 1e-3, encoder=True),
    Phase("frozen", 3, 2, 1e-3, (1, 1, 1, 1, 1, 1), drop=0.5),
    Phase("whole", 3, 2, 1e-3, (1, 1, 1, 1, 1, 1), encoder=True, drop=0.5),
)


@pytest.fixture(autouse=True)
def short_checks(monkeypatch):
    monkeypatch.setattr(train, "CHECK_VIDEOS", 5)
    monkeypatch.setattr(train, "_CHECK_AT_ONCE", 5)
    monkeypatch.setattr(train, "SAVE_EVERY", 1)


def weights(folder):
    return LlavaOnevisionForConditionalGeneration.from_pretrained(folder).state_dict()


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


class Stopped(Exception):
    """Somebody pulled the plug."""


def stop_after(monkeypatch, steps):
    """Let ``steps`` steps be saved, then stop."""
    save = train.Run.save
    saved = []

    def stopping(run):
        save(run)
        saved.append(run.step)
        if len(saved) == steps:
            raise Stopped

    monkeypatch.setattr(train.Run, "save", stopping)


@pytest.mark.parametrize("stop", [1, 2, 5, 6, 7, 9, 10])  # 1, 5 and 9 are beginnings of phases
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, monkeypatch, stop):
    whole = weights(train.train(tmp_path / "whole", 4, SHORT, cpu=True))
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        with pytest.raises(Stopped):
            train.train(tmp_path / "stopped", 4, SHORT, cpu=True)
    assert same(whole, weights(train.train(tmp_path / "stopped", 4, SHORT, cpu=True)))
    assert history(tmp_path / "stopped") == history(tmp_path / "whole")


TWO_PROCESSES = """
import sys
from pathlib import Path
from earlytom_compile.toyworld import train
from earlytom_compile.toyworld.train import Phase

train.CHECK_VIDEOS = train._CHECK_AT_ONCE = 5
train.SAVE_EVERY = 2
phases = (Phase("patches", 2, 2, 1e-3, encoder=True), Phase("whole", 2, 2, 1e-3, (1,) * 6, encoder=True, drop=0.5))
train.train(Path(sys.argv[1]), 4, phases, cpu=True)
"""


def test_two_processes_train_one_model(tmp_path):
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, tmp_path / "script.py", tmp_path / "run"], check=True)
    assert (tmp_path / "run" / "state" / "random_states_1.pkl").exists()
    checks = [line for line in history(tmp_path / "run") if "validation" in line]
    assert [(line["phase"], line["step"]) for line in checks] == [("whole", 2)]  # written once, not by both
    assert all(value.isfinite().all() for value in weights(tmp_path / "run" / "checkpoint").values())


def test_another_seed_is_another_model(tmp_path):
    one, other = (weights(train.train(tmp_path / str(seed), seed, SHORT, cpu=True)) for seed in (1, 2))
    assert not same(one, other)


def test_a_folder_with_another_run_is_left_alone(tmp_path):
    train.train(tmp_path, 1, SHORT[:1], cpu=True)
    with pytest.raises(SystemExit, match="seed 1"):
        train.train(tmp_path, 2, SHORT[:1], cpu=True)


def test_history_and_curves(tmp_path):
    train.train(tmp_path, 1, SHORT, cpu=True)
    lines = history(tmp_path)
    checks = [line for line in lines if "validation" in line]
    assert [line["phase"] for line in checks] == ["frozen", "whole"]
    assert all(set(line["validation"]) == set(CATEGORIES) for line in checks)
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_only_a_phase_with_the_encoder_trains_it(tmp_path):
    for phase in SHORT[1:]:
        model = build_model(0)
        trainee = AnswerTrainee(model, phase)
        sum(trainee(question_batch(range(2), dict.fromkeys(CATEGORIES, 1.0), 2)).values()).backward()
        touched = [p.grad is not None for p in model.model.vision_tower.encoder.parameters()]
        assert any(touched) == phase.encoder
        assert model.model.multi_modal_projector.linear_1.weight.grad is not None


@pytest.mark.parametrize("kind", ["patches", "answers"])
def test_losses_fall_on_one_batch(kind):
    torch.manual_seed(0)
    model = build_model(0).train()
    if kind == "patches":
        trainee, batch = PatchTrainee(model), patch_batch(range(4))
    else:
        trainee = AnswerTrainee(model, SHORT[2])
        batch = question_batch(range(4), dict.fromkeys(CATEGORIES, 1.0), 3)
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        loss = sum(trainee(batch).values())
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


def test_dropped_tokens_keep_their_order():
    tokens = torch.arange(50.0).expand(3, 50)[..., None]
    kept = train.some_of(tokens, 7)
    assert kept.shape == (3, 7, 1)
    assert (kept.diff(dim=1) > 0).all()
    assert not torch.equal(kept[0], kept[1])
