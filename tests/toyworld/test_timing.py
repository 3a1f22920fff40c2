"""First tokens: of the rows as users call them, one video and one question at a time, all rows in turn."""

from dataclasses import replace

import pytest
import torch

import earlytom_compile
from earlytom_compile.toyworld import report, timing
from earlytom_compile.toyworld.answers import answer_logits, normalized
from earlytom_compile.toyworld.baselines import AVERAGING, BASELINES, POOLING, SUBSAMPLING
from earlytom_compile.toyworld.batches import rows_of
from earlytom_compile.toyworld.checkpoint import build_model
from earlytom_compile.toyworld.evaluate import Arm, arms, load_questions, made
from earlytom_compile.toyworld.installed import REUSE
from earlytom_compile.toyworld.language import build_tokenizer
from earlytom_compile.toyworld.merging import RUNS
from earlytom_compile.toyworld.methods import ALL_TOKENS, STAGE_1
from earlytom_compile.toyworld.model import SHAPE


@pytest.fixture(scope="module")
def model():
    return build_model(replace(SHAPE, vision_layers=3, text_layers=2), build_tokenizer(), seed=5).eval()


@pytest.fixture(scope="module")
def questions():
    return load_questions("validation", first=3, videos=3)


ROWS = (
    Arm(ALL_TOKENS),
    Arm("earlytom paper", 0.25),
    Arm(SUBSAMPLING, 0.25),
    Arm(AVERAGING, None, (("frames", 3),)),
    Arm(POOLING, None, (("grid", (3, 2, 4)),)),
    Arm(RUNS, None, (("tau_run", 0.5),)),
    Arm(RUNS, 0.1, (("tau_run", 0.5),)),
    Arm(STAGE_1),
)


@pytest.mark.parametrize("arm", ROWS, ids=report.label)
@torch.no_grad()
def test_the_first_token_is_the_rows_answer(model, questions, arm):
    compress = made(model, arm, {})
    call = timing.first_token(model, arm, compress)
    for frames, asked in zip(questions.frames, questions.asked, strict=True):
        pixels = normalized(frames)
        logits, _ = answer_logits(model, [compress(pixels).tokens], rows_of([asked]))
        said = [call(pixels, question)[0, -1].item() for question in asked]
        assert said == logits[::2].argmax(-1).tolist()


def test_a_compressed_row_is_called_compressed(model, questions):
    arm = Arm("earlytom paper, inner", 0.25)
    compress = made(model, arm, {})
    timing.first_token(model, arm, compress)(normalized(questions.frames[0]), questions.asked[0][0])
    report = earlytom_compile.report(compress.model)
    assert report.last_call == "compressed" and report.to_dict()["videos"][0]["tokens"] == [128, 32]
    assert report.config.inner_layer == 1 and report.config.lowering == "eager" and report.config.strict


def test_only_what_generate_runs_is_timed():
    found = {arm.method for arm in arms((0.1,)) if timing.can_be_called(arm)}
    assert found == {
        *(ALL_TOKENS, REUSE, STAGE_1, *BASELINES, "earlytom plus, merging"),
        *(f"earlytom {variant}{inner}" for variant in ("paper", "released", "plus") for inner in ("", ", inner")),
    }


def test_rows_take_turns_and_what_is_known_stays(questions, monkeypatch):
    calls, seconds = [], iter(range(100))
    monkeypatch.setattr(timing, "seconds_of", lambda call, device: (call(), (float(next(seconds)), None))[1])
    old, new = Arm("old"), Arm("new")

    def call_of(arm):
        return lambda pixels, question: calls.append((arm.method, question))

    saved = []
    cpu = torch.device("cpu")
    found = timing.timed({arm: call_of(arm) for arm in (old, new)}, questions, {old: (9.0,)}, 3, cpu, saved.append)
    first, second, third = (asked[0] for asked in questions.asked)
    warm_up = [(name, first) for name in ("old", "new") for _ in range(2)]
    expected = [("new", first), ("old", second), ("new", second), ("old", third), ("new", third)]
    assert calls == warm_up + expected
    assert found == {old: (9.0, 1.0, 3.0), new: (0.0, 2.0, 4.0)}
    assert saved == [{old: found[old][:n], new: found[new][:n]} for n in (1, 2, 3)]
    del calls[:]
    assert timing.timed({old: call_of(old)}, questions, found, 2, cpu) == {old: found[old]} and calls == []
