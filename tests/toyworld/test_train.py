"""The training script: losses fall, a run goes on where it stopped, the checkpoint is one that loads.

Tests that train more than the one run of ``whole`` are long.
"""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration

from earlytom_compile.toyworld import train
from earlytom_compile.toyworld.batches import patch_batch, question_batch
from earlytom_compile.toyworld.checkpoint import build_model as build_tiny_model
from earlytom_compile.toyworld.language import build_tokenizer
from earlytom_compile.toyworld.model import SHAPE
from earlytom_compile.toyworld.questions import CATEGORIES
from earlytom_compile.toyworld.train import AnswerTrainee, PatchTrainee, Phase

SHORT = (
    Phase("patches", 2, 2, 1e-3, encoder=True),
    Phase("frozen", 2, 2, 1e-3, (1, 1, 1, 1, 1, 1), drop=0.5),
    Phase("whole", 2, 2, 1e-3, (1, 1, 1, 1, 1, 1), encoder=True, drop=0.5),
)
# Whether a run goes on where it stopped does not depend on how deep its model is.
SHALLOW = replace(SHAPE, vision_layers=2, text_layers=1)


def shallow_model(seed):
    return build_tiny_model(SHALLOW, build_tokenizer(), seed=seed)


@pytest.fixture(scope="module", autouse=True)
def short_runs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "CHECK_VIDEOS", 5)
        patch.setattr(train, "_CHECK_AT_ONCE", 5)
        patch.setattr(train, "SAVE_EVERY", 1)
        patch.setattr(train, "build_model", shallow_model)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train.train(folder, 4, SHORT, cpu=True)
    return folder


@pytest.fixture
def no_curves(monkeypatch):
    """Drawing them takes as long as a run of six steps."""
    monkeypatch.setattr(train, "draw_curves", lambda history, picture: None)


def weights(folder):
    return LlavaOnevisionForConditionalGeneration.from_pretrained(folder).state_dict()


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


class Stopped(Exception):
    """Somebody pulled the plug."""


def run_until_stopped(folder, monkeypatch, steps):
    """Let ``steps`` steps be saved, then stop."""
    save = train.Run.save
    saved = []

    def stopping(run):
        save(run)
        saved.append(run.step)
        if len(saved) == steps:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train.Run, "save", stopping)
        train.train(folder, 4, SHORT, cpu=True)


# 1, 4 and 7 are beginnings of phases, 2, 5 and 8 lie within them, and 3, 6 and 9 are their last steps.
ONE_STOP = [(stop,) for stop in range(1, 10)]


@pytest.mark.long
@pytest.mark.parametrize("stops", [(3, 2), *ONE_STOP])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(whole, tmp_path, monkeypatch, no_curves, stops):
    for steps in stops:
        run_until_stopped(tmp_path, monkeypatch, steps)
    assert same(weights(whole / "checkpoint"), weights(train.train(tmp_path, 4, SHORT, cpu=True)))
    assert history(tmp_path) == history(whole)


TWO_PROCESSES = """
import sys
from dataclasses import replace
from pathlib import Path

from accelerate import debug_launcher

from earlytom_compile.toyworld import train
from earlytom_compile.toyworld.checkpoint import build_model
from earlytom_compile.toyworld.language import build_tokenizer
from earlytom_compile.toyworld.model import SHAPE
from earlytom_compile.toyworld.train import Phase

shape = replace(SHAPE, vision_layers=2, text_layers=1)
train.build_model = lambda seed: build_model(shape, build_tokenizer(), seed=seed)
train.CHECK_VIDEOS = train._CHECK_AT_ONCE = 5
train.SAVE_EVERY = 2
phases = (Phase("patches", 2, 2, 1e-3, encoder=True), Phase("whole", 2, 2, 1e-3, (1,) * 6, encoder=True, drop=0.5))


def run():
    train.train(Path(sys.argv[1]), 4, phases, cpu=True)


if sys.argv[2:] == ["fork"]:
    debug_launcher(run, num_processes=2)
else:
    run()
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


# Forked, both have what one has imported; torchrun, which most people will use, starts two that import it all again.
@pytest.mark.long
@pytest.mark.parametrize("launch, how", [((), ("fork",)), (TORCHRUN, ())], ids=["forked", "torchrun"])
def test_two_processes_train_one_model(tmp_path, launch, how):
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    subprocess.run([sys.executable, *launch, tmp_path / "script.py", tmp_path / "run", *how], check=True)
    assert (tmp_path / "run" / "state" / "random_states_1.pkl").exists()
    checks = [line for line in history(tmp_path / "run") if "validation" in line]
    assert [(line["phase"], line["step"]) for line in checks] == [("whole", 2)]  # written once, not by both
    assert all(value.isfinite().all() for value in weights(tmp_path / "run" / "checkpoint").values())


SEEDS = {"one": 4, "same seed": 4, "other": 5}


@pytest.mark.long
def test_another_seed_is_another_model(tmp_path, no_curves):
    one, same_seed, other = (train.train(tmp_path / name, seed, SHORT[:1], cpu=True) for name, seed in SEEDS.items())
    assert same(weights(one), weights(same_seed)) and not same(weights(one), weights(other))


def test_a_folder_with_another_run_is_left_alone(whole):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="seed 4"):
        train.train(whole, 2, SHORT, cpu=True)
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_history_and_curves(whole):
    checks = [line for line in history(whole) if "validation" in line]
    assert [line["phase"] for line in checks] == ["frozen", "whole"]
    assert all(set(line["validation"]) == set(CATEGORIES) for line in checks)
    assert (whole / "curves.png").stat().st_size > 1000


def test_only_a_phase_with_the_encoder_trains_it():
    for phase in SHORT[1:]:
        model = shallow_model(0)
        trainee = AnswerTrainee(model, phase)
        sum(trainee(question_batch(range(2), dict.fromkeys(CATEGORIES, 1.0), 2)).values()).backward()
        touched = [p.grad is not None for p in model.model.vision_tower.encoder.parameters()]
        assert any(touched) == phase.encoder
        assert model.model.multi_modal_projector.linear_1.weight.grad is not None


@pytest.mark.parametrize("kind", ["patches", "answers"])
def test_losses_fall_on_one_batch(kind):
    torch.manual_seed(0)
    model = shallow_model(0).train()
    if kind == "patches":
        trainee, batch = PatchTrainee(model), patch_batch(range(4))
    else:
        trainee = AnswerTrainee(model, SHORT[2])
        batch = question_batch(range(4), dict.fromkeys(CATEGORIES, 1.0), 3)
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=2e-3)
    losses = []
    for _ in range(100):
        loss = sum(trainee(batch).values())
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if len(losses) >= 5 and sum(losses[-5:]) / 5 < losses[0] / 2:
            return
    pytest.fail(f"after a hundred steps {losses[0]} is {losses[-5:]}")


def test_dropped_tokens_keep_their_order():
    tokens = torch.arange(50.0).expand(3, 50)[..., None]
    kept, places = train.some_of(tokens, 7)
    assert kept.shape == (3, 7, 1)
    assert torch.equal(tokens[torch.arange(3)[:, None], places], kept)
    assert (kept.diff(dim=1) > 0).all()
    assert not torch.equal(kept[0], kept[1])
