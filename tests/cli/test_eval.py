"""``earlytom eval``: which rows, what an interruption leaves, and what is refused."""

import json

import numpy as np
import pytest
from effort import examples
from hypothesis import given
from hypothesis import strategies as st

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.cli import eval as command
from earlytom_compile.cli.main import main
from earlytom_compile.toyworld import evaluate
from earlytom_compile.toyworld.evaluate import Result, arms
from earlytom_compile.toyworld.methods import ALL_TOKENS, METHODS
from earlytom_compile.toyworld.questions import CATEGORIES

VIDEOS = 4
TOY = ["eval", "--toy", "--videos", str(VIDEOS), "--device", "cpu"]


@pytest.fixture
def counted(monkeypatch):
    """Rows that were asked for, in their order; answers are drawn. ``counted.stop_at`` is where Ctrl-C comes."""

    class Rows(list):
        stop_at: int | None = None

    rows = Rows()

    def evaluated(model, questions, name, ratio, options, answered):
        if len(rows) == rows.stop_at:
            raise KeyboardInterrupt
        rows.append((name, ratio))
        rng = np.random.default_rng(len(name))
        asked = np.array([[c in {q.category for q in asked} for c in CATEGORIES] for asked in questions.asked])
        return Result(name, ratio, 13.0, asked & (rng.random(asked.shape) < 0.7), asked)

    monkeypatch.setattr(evaluate, "evaluate", evaluated)
    monkeypatch.setattr(command, "_say_how_long", lambda *given: None)
    return rows


def test_rows_are_chosen_by_the_beginnings_of_their_names():
    every = arms((0.25, 0.1))
    plus = [("earlytom plus", 0.25), ("earlytom plus", 0.1)]
    assert arms((0.25, 0.1), ("earlytom plus",)) == [(ALL_TOKENS, None), *plus]
    assert arms((0.25, 0.1), ("e", "a", "o", "t", "r", "f", "n")) == every
    with pytest.raises(EarlyTomConfigError, match="methods='pluss': no method begins so; there are all tokens"):
        arms((0.1,), ("earlytom", "pluss"))


@examples(60)
@given(st.lists(st.sampled_from([name for name in METHODS]), min_size=1, unique=True), st.data())
def test_chosen_rows_are_those_of_the_full_table_in_its_order(names, data):
    beginnings = tuple(name[: data.draw(st.integers(1, len(name)))] for name in names)
    found = arms((0.25, 0.1), beginnings)
    expected = [
        (name, ratio)
        for name, ratio in arms((0.25, 0.1))
        if name == ALL_TOKENS or any(name[: len(beginning)] == beginning for beginning in beginnings)
    ]
    assert found == expected and found[0] == (ALL_TOKENS, None)


@pytest.mark.parametrize(
    "more, rows",
    [
        (["--variant", "plus"], [(ALL_TOKENS, None), ("earlytom plus", 0.1)]),
        (["--methods", "no,random"], [(ALL_TOKENS, None), ("no tokens", None), ("random tokens", 0.1)]),
    ],
)
def test_only_chosen_rows_are_counted_and_shown(more, rows, counted, capsys):
    assert main([*TOY, "--retain-ratios", "0.1", *more]) == 0
    printed = capsys.readouterr().out
    assert counted == rows and all(name in printed for name, _ in rows) and "average pooling" not in printed


def test_ctrl_c_saves_finished_rows_and_resume_counts_the_rest(counted, tmp_path, capsys):
    file, words = tmp_path / "eval.json", [*TOY, "--variant", "plus", "--retain-ratios", "0.25,0.1", "--json"]
    counted.stop_at = 2
    assert main([*words, str(file)]) == 130
    assert f"stopped: {file} has 2 of 3 rows;" in " ".join(capsys.readouterr().err.split())
    saved = json.loads(file.read_text())["results"]
    assert [(row["method"], row["retain_ratio"]) for row in saved] == [(ALL_TOKENS, None), ("earlytom plus", 0.25)]
    counted.stop_at = None
    assert main([*words, str(file), "--resume"]) == 0
    assert counted == [(ALL_TOKENS, None), ("earlytom plus", 0.25), ("earlytom plus", 0.1)]
    resumed, table = json.loads(file.read_text()), capsys.readouterr().out
    assert resumed["results"][:2] == saved
    # Another ratio, another method: rows do not depend on each other.
    others = ["--methods", "earlytom plus,random", "--retain-ratios", "0.1"]
    assert main([*TOY, *others, "--json", str(file), "--resume"]) == 0
    assert counted[3:] == [("random tokens", 0.1)]
    kept = {(row["method"], row["retain_ratio"]) for row in json.loads(file.read_text())["results"]}
    assert kept == {*counted}
    # In one go, the same numbers and the same table.
    del counted[:]
    assert main([*words, str(tmp_path / "again.json")]) == 0 and len(counted) == 3
    again = json.loads((tmp_path / "again.json").read_text())
    assert {**again, "command": 0} == {**resumed, "command": 0} and capsys.readouterr().out.endswith(table)


@examples(40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_a_row_comes_back_as_it_was(seed, videos):
    rng = np.random.default_rng(seed)
    asked = rng.random((videos, len(CATEGORIES))) < 0.6
    row = Result("only stage 1", None, 12.5, asked & (rng.random(asked.shape) < 0.5), asked)
    again = Result.from_dict(json.loads(json.dumps({**row.to_dict(), "interval": None, "categories": None})))
    assert (again.method, again.retain_ratio, again.tokens) == (row.method, row.retain_ratio, row.tokens)
    assert np.array_equal(again.right, row.right) and np.array_equal(again.asked, row.asked)


@pytest.mark.parametrize(
    "more, says",
    [
        (["--videos", "5"], "videos=4, and this would be videos=5"),
        (["--split", "validation"], "split='test', and this would be split='validation'"),
        (["--tau-merge", "0.9"], "tau_merge"),
    ],
)
def test_rows_of_other_videos_or_options_are_refused(more, says, counted, tmp_path, capsys):
    words = [*TOY, "--variant", "plus", "--retain-ratios", "0.1", "--json", str(tmp_path / "eval.json")]
    assert main(words) == 0
    words = words[:2] + words[4:] if more[0] == "--videos" else words
    assert main([*words, *more, "--resume"]) == 2
    assert says in capsys.readouterr().err and len(counted) == 2


@pytest.mark.parametrize(
    "more, says",
    [
        (["--video", __file__], "earlytom compare"),
        (["--variant", "plus", "--methods", "random"], "variant='plus' with --methods"),
        (["--methods", "xyz"], "methods='xyz': no method begins so"),
        (["--methods", "no", "--retain-ratios", "0.1"], "none of these has a ratio"),
        (["--methods", "average", "--tau-seg", "0.5"], "tau_seg=0.5: none of these takes it"),
        (["--methods", "random", "--max-window", "4"], "max_window=4: none of these takes it"),
        (["--merge-layers", "2,8"], "layer 8 does not exist"),
        (["--resume"], "--resume without --json FILE"),
    ],
)
def test_mistakes_are_found_first(more, says, counted, monkeypatch, capsys):
    def never(*arguments):
        raise AssertionError("videos were drawn before the mistake was found")

    monkeypatch.setattr(evaluate, "load_questions", never)
    assert main([*TOY, *more]) == 2
    assert says in capsys.readouterr().err and counted == []


def test_how_long_it_takes_is_measured_and_said(monkeypatch, capsys):
    done = []

    def evaluated(model, questions, name, ratio, options=None, answered=lambda videos: None):
        done.append((name, ratio, len(questions.asked)))
        asked = np.ones((len(questions.asked), len(CATEGORIES)), bool)
        return Result(name, ratio, 1.0, asked, asked)

    monkeypatch.setattr(evaluate, "evaluate", evaluated)
    assert main([*TOY, "--methods", "random", "--retain-ratios", "0.1"]) == 0
    assert "2 rows, 4 videos: less than a minute (measured with 4 of them)" in capsys.readouterr().err
    assert done == [(ALL_TOKENS, None, 1), (ALL_TOKENS, None, 4), (ALL_TOKENS, None, 4), ("random tokens", 0.1, 4)]
