"""Counting right answers: what is counted, how sure it is, and the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from pixels import seen

from earlytom_compile.cli.main import main
from earlytom_compile.toyworld import report
from earlytom_compile.toyworld.answers import answer_logits
from earlytom_compile.toyworld.checkpoint import build_model
from earlytom_compile.toyworld.evaluate import Arm, Cost, Result, arms, evaluate, load_questions
from earlytom_compile.toyworld.installed import REUSE
from earlytom_compile.toyworld.language import build_tokenizer
from earlytom_compile.toyworld.methods import ALL_TOKENS, METHODS, NO_TOKENS, STAGE_1, method
from earlytom_compile.toyworld.model import SHAPE, save
from earlytom_compile.toyworld.questions import CATEGORIES
from earlytom_compile.toyworld.world import sample_video


@pytest.fixture(scope="module")
def model():
    # What is counted and written does not depend on how deep the model is that is compiled for every arm; rows with
    # inner merging need a layer before the one where tokens merge.
    return build_model(replace(SHAPE, vision_layers=3, text_layers=2), build_tokenizer(), seed=5).eval()


@pytest.fixture(scope="module")
def questions():
    return load_questions("validation", first=7, videos=12)


def result_of(right, asked):
    return Result(Arm("some", 0.1), Cost(13.0, 11.5, 0.5, 4e8), np.array(right, bool), np.array(asked, bool))


def test_questions_are_the_same_in_every_run(questions):
    again = load_questions("validation", first=7, videos=12)
    assert torch.equal(questions.frames, again.frames) and questions.asked == again.asked
    assert all(len({q.category for q in asked}) == len(asked) > 0 for asked in questions.asked)


def test_frames_of_a_file_are_near_the_drawn_ones_and_questions_stay(questions):
    encoded = load_questions("validation", first=7, videos=3, encoded=True)
    assert encoded.asked == questions.asked[:3] and encoded.frames.dtype == torch.uint8
    apart = (encoded.frames.float() - questions.frames[:3].float()).abs().mean((2, 3, 4))  # [3, 8]
    assert 0 < apart.max() < 8
    # Each is nearest to the frame that it is sampled from, or as near to one that looks the same.
    for video, drawn in zip(encoded.frames.float(), questions.frames.float(), strict=False):
        distances = (video[:, None] - drawn[None]).abs().mean((2, 3, 4))
        assert (distances.diagonal() <= distances.min(1).values + 1).all()


def test_noise_has_the_spread_that_was_asked_for_and_is_the_same_in_every_run(questions):
    noisy = load_questions("validation", first=7, videos=3, noise=0.05)
    apart = (noisy.frames.float() - questions.frames[:3].float()) / 127.5
    inside = (questions.frames[:3] > 40) & (questions.frames[:3] < 215)  # where nothing is cut off
    assert apart[inside].std() == pytest.approx(0.05, rel=0.02) and abs(apart[inside].mean()) < 1e-3
    assert torch.equal(noisy.frames, load_questions("validation", first=7, videos=3, noise=0.05).frames)
    first, second = apart[0, :2]
    assert not torch.equal(first, second)


def test_chance_is_one_over_the_choices(questions):
    for category, chance in questions.chance.items():
        of_category = [q for asked in questions.asked for q in asked if q.category == category]
        assert chance == pytest.approx(np.mean([1 / len(q.choices) for q in of_category]))


def test_chance_over_all_questions_counts_each_once(questions):
    every = [1 / len(q.choices) for asked in questions.asked for q in asked]
    assert questions.overall_chance == pytest.approx(np.mean(every))


def test_videos_with_pairs_that_training_never_shows_are_known(questions):
    never = {("red", "ring"), ("blue", "triangle"), ("yellow", "cross"), ("white", "circle")}
    for number, there in enumerate(questions.held_out):
        shown = {(s.color, s.shape) for s in seen(replace(sample_video("validation", 7 + number), specks={}).frames())}
        assert bool(there) == bool(shown & never)
    assert 0 < questions.held_out.sum() < len(questions.held_out)


def test_a_part_of_the_videos_is_counted_by_itself():
    right, asked = np.eye(4, 5, dtype=bool), np.ones((4, 5), bool)
    part = result_of(right, asked).of(np.array([True, False, False, True]))
    assert part.accuracy() == pytest.approx(2 / 10) and part.accuracy("appearance") == pytest.approx(1 / 2)


def test_a_model_that_always_says_one_word_is_right_where_that_is_the_answer(model, questions):
    said = questions.asked[0][0].answer

    def only(model, videos, rows):
        logits, labels = answer_logits(model, videos, rows)
        from earlytom_compile.toyworld.batches import IDS

        logits[:, IDS[said]] = 1e9
        return logits, labels

    always = replace(questions, world=replace(questions.world, answer_logits=only))
    found = evaluate(model, always, Arm(ALL_TOKENS))
    expected = [[q.answer == said for q in asked] for asked in questions.asked]
    assert found.right.sum() == sum(map(sum, expected)) > 0
    assert found.asked.sum() == sum(map(len, expected))
    for video, asked in enumerate(questions.asked):
        for question in asked:
            column = CATEGORIES.index(question.category)
            assert found.asked[video, column]
            assert found.right[video, column] == (question.answer == said)


def test_arms_are_all_methods_at_all_ratios():
    expected = {Arm(ALL_TOKENS), Arm(NO_TOKENS), Arm(STAGE_1), Arm(REUSE)}
    expected |= {Arm(name, ratio) for name in METHODS for ratio in (0.25, 0.1)}
    found = arms((0.25, 0.1))
    assert set(found) == expected and len(found) == len(expected)


def test_options_reach_the_methods(model, questions):
    never = evaluate(model, questions, Arm(STAGE_1), {"tau_merge": 2.0})
    sometimes = evaluate(model, questions, Arm(STAGE_1))
    assert never.cost.tokens == 128 > sometimes.cost.tokens and never.cost.work == 1 > sometimes.cost.work
    assert never.cost.flops > sometimes.cost.flops


def test_tokens_and_accuracy_of_a_chunked_run_are_those_of_one_chunk(model, questions, monkeypatch):
    whole = evaluate(model, questions, Arm("random tokens", 0.25))
    monkeypatch.setattr("earlytom_compile.toyworld.evaluate._AT_ONCE", 5)
    parts = evaluate(model, questions, Arm("random tokens", 0.25))
    assert np.array_equal(whole.right, parts.right) and np.array_equal(whole.asked, parts.asked)


@examples(20)
@given(st.integers(0, 2**32 - 1), st.integers(5, 60))
def test_accuracy_lies_in_its_interval(seed, videos):
    rng = np.random.default_rng(seed)
    asked = rng.random((videos, 5)) < 0.7
    asked[:, 0] = True
    found = result_of(asked & (rng.random((videos, 5)) < 0.6), asked)
    low, high = found.interval()
    assert 0 <= low <= found.accuracy() <= high <= 1
    assert found.accuracy() == found.right.sum() / asked.sum()


def test_the_interval_narrows_with_videos_and_matches_the_binomial():
    rng = np.random.default_rng(0)
    asked = np.zeros((1000, 5), bool)
    asked[:, 0] = True  # one question a video: a binomial
    low, high = result_of(asked & (rng.random((1000, 5)) < 0.8), asked).interval()
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.8 * 0.2 / 1000), rel=0.15)


def test_questions_of_a_video_count_together():
    right = np.repeat(np.random.default_rng(0).random((400, 1)) < 0.5, 5, axis=1)  # all right or all wrong
    asked = np.ones_like(right)
    low, high = result_of(right, asked).interval()
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 400), rel=0.15)  # not over 2000 questions


def test_a_category_nobody_asked_about_has_no_interval():
    asked = np.zeros((4, 5), bool)
    asked[:, 0] = True
    assert np.isnan(result_of(asked, asked).interval("needle")).all()
    assert np.isnan(result_of(asked, asked).accuracy("needle")) and result_of(asked, asked).accuracy() == 1


def test_no_videos_have_no_interval():
    none = np.zeros((0, 5), bool)
    assert np.isnan(result_of(none, none).interval()).all() and np.isnan(result_of(none, none).accuracy())


def test_what_was_not_asked_is_a_dash_and_one_is_not_many(questions):
    few = replace(questions.first(3), held_out=np.array([False, True, False]))
    asked = np.zeros((3, 5), bool)
    asked[:, 0] = True
    few.asked[:] = [[q for q in asked_about if q.category == CATEGORIES[0]] for asked_about in few.asked]
    full = replace(result_of(asked, asked), arm=Arm(ALL_TOKENS))
    cells, guessing = report.rows([full], few)
    assert cells[2:7] == ("13", "11.5", "50.0%", "400", "–")
    assert cells[7:] == ("100.0 (100.0-100.0)", "", "100.0", "–", "–", "–", "–")
    assert guessing[-4:] == ("–",) * 4
    text = report.to_markdown([full], few, {"command": "c"})
    assert "nan" not in text and "3 questions about 3 videos" in text
    assert "100.0 (–) in the 1 video with an unseen pair, 100.0 (100.0-100.0) in the 2 videos without." in text
    content = report.to_dict([full], few, {"torch": "2"}, {"m": [full]})
    json.dumps(content, allow_nan=False)
    assert content["unseen pairs"]["with an unseen pair"] == {"videos": 1, "accuracy": 1.0, "interval": [None, None]}
    assert content["results"][0]["categories"]["needle"] == {"accuracy": None, "interval": [None, None]}
    one = replace(few.first(1), held_out=np.array([False]))
    said = report.to_markdown([replace(full, asked=asked[:1], right=asked[:1])], one, {"command": "c"})
    assert "1 question about 1 video:" in said and "no video with an unseen pair, 100.0 (–) in the 1 video" in said


@pytest.mark.long
@pytest.mark.parametrize("ratios", ["0.1", "0.25,0.1"])  # tests/cli/test_eval.py has the command with fewer arms
def test_the_command_evaluates_every_arm_and_writes_what_it_prints(model, tmp_path, capsys, ratios):
    folder = save(model, tmp_path / "model")
    files = [str(tmp_path / name) for name in ("a.json", "a.md", "plots")]
    command = ["eval", "--toy", "--model", str(folder), "--videos", "6", "--retain-ratios", ratios]
    assert main([*command, "--device", "cpu", "--json", files[0], "--markdown", files[1], "--plot", files[2]]) == 0
    content = json.loads((tmp_path / "a.json").read_text())
    found = {Arm(result["method"], result["retain_ratio"]): result for result in content["results"]}
    assert list(found) == arms(tuple(map(float, ratios.split(",")))) and len(found) == len(content["results"])
    assert found[Arm(ALL_TOKENS)]["tokens"] == 128
    assert found[Arm(NO_TOKENS)]["tokens"] == 0
    assert found[Arm("earlytom paper", 0.1)]["tokens"] == 13
    assert found[Arm(REUSE)]["tokens"] == 128 and found[Arm(REUSE)]["work"] < found[Arm(ALL_TOKENS)]["work"] == 1
    assert content["split"] == "test" and content["torch"] == torch.__version__
    assert sum(part["videos"] for part in content["unseen pairs"].values()) == 6
    table = (tmp_path / "a.md").read_text()
    printed = capsys.readouterr().out
    for name in (ALL_TOKENS, NO_TOKENS, STAGE_1, *METHODS, "guessing"):
        assert name in printed and f"| {name} |" in table
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "cost.png", "accuracy.png", "categories.png", "encoder.png",
    }  # fmt: skip


@pytest.mark.parametrize(
    "wrong, word",
    [
        (["eval"], "--toy"),
        (["eval", "--toy", "--videos", "0"], "videos=0"),
        (["eval", "--toy", "--first", "-1"], "first=-1"),
        (["eval", "--toy", "--retain-ratios", "0.1,2"], "2.0"),
        (["eval", "--toy", "--model", "/nowhere"], "/nowhere"),
        (["eval", "--toy", "--json", "/"], "folder"),
    ],
)
def test_mistakes_are_named(wrong, word, capsys):
    assert main(wrong) == 2
    assert word in capsys.readouterr().err


def test_a_method_without_tokens_still_answers(model, questions):
    assert len(method(NO_TOKENS, model, 0.1)(torch.zeros(8, 3, 96, 96)).tokens) == 0
