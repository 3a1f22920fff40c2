"""``earlytom eval``: which rows, what an interruption leaves, and what is refused."""

import json
from importlib.metadata import EntryPoint

import numpy as np
import pytest
from effort import cases, examples
from hypothesis import given
from hypothesis import strategies as st

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.cli import eval_toy as command
from earlytom_compile.cli.main import main
from earlytom_compile.methods import registry
from earlytom_compile.methods.base import Method, Step
from earlytom_compile.toyworld import evaluate, pareto_rows, timing
from earlytom_compile.toyworld.baselines import BASELINES, SUBSAMPLING
from earlytom_compile.toyworld.evaluate import Arm, Cost, Result, arms
from earlytom_compile.toyworld.installed import OURS, PLUS_MERGING, REUSE, other_methods
from earlytom_compile.toyworld.merging import RUNS
from earlytom_compile.toyworld.methods import ALL_TOKENS, METHODS
from earlytom_compile.toyworld.model import WEIGHTS
from earlytom_compile.toyworld.questions import CATEGORIES

VIDEOS = 4
TOY = ["eval", "--toy", "--videos", str(VIDEOS), "--device", "cpu"]


@pytest.fixture
def counted(monkeypatch):
    """Rows that were asked for, in their order; answers are drawn. ``counted.stop_at`` is where Ctrl-C comes,
    ``counted.options`` what each row was asked for with. ``counted.called``: rows and videos whose first token was
    timed, where ``stop_at_call`` is Ctrl-C; the ``n``-th takes n seconds."""

    class Rows(list):
        stop_at: int | None = None
        stop_at_call: int | None = None
        options: list[dict] = []
        called: list = []

    rows = Rows()
    rows.options, rows.called = [], []

    def evaluated(model, questions, arm, options, answered, compress):
        if len(rows) == rows.stop_at:
            raise KeyboardInterrupt
        rows.append(arm)
        rows.options.append(evaluate.options_of(arm, options))
        rng = np.random.default_rng(len(arm.method))
        asked = np.array([[c in {q.category for q in asked} for c in CATEGORIES] for asked in questions.asked])
        return Result(arm, Cost(13.0, 11.5, 0.5, 4e8), asked & (rng.random(asked.shape) < 0.7), asked)

    def first_token(model, arm, compress, world):
        def call(pixels, question):
            if warm_up[arm] < timing._WARM_UP:
                warm_up[arm] += 1
                return
            if len(rows.called) == rows.stop_at_call:
                raise KeyboardInterrupt
            rows.called.append((arm, question.text))

        warm_up[arm] = 0
        return call

    def seconds_of(call, device):
        call()
        return float(len(rows.called)), None

    warm_up = {}
    monkeypatch.setattr(evaluate, "made", lambda model, arm, options: arm)
    monkeypatch.setattr(evaluate, "evaluate", evaluated)
    monkeypatch.setattr(timing, "first_token", first_token)
    monkeypatch.setattr(timing, "seconds_of", seconds_of)
    monkeypatch.setattr(command, "_say_how_long", lambda *given: None)
    return rows


def test_rows_are_chosen_by_the_beginnings_of_their_names():
    every = arms((0.25, 0.1))
    names = ("earlytom plus", "earlytom plus, inner", PLUS_MERGING)
    plus = [Arm(name, ratio) for name in names for ratio in (0.25, 0.1)]
    assert arms((0.25, 0.1), ("earlytom plus",)) == [Arm(ALL_TOKENS), *plus]
    assert arms((0.25, 0.1), (*OURS, "a", "o", "t", "r", "frame", "n")) == every
    with pytest.raises(EarlyTomConfigError, match="methods='pluss': no method begins so; there are all tokens"):
        arms((0.1,), ("earlytom", "pluss"))


def test_other_papers_methods_are_rows_where_somebody_asks_for_them(here):
    ours = arms((0.1,))
    assert arms((0.1,), ("all",)) == [*ours, *(Arm(name, 0.1) for name in other_methods())]
    assert {"some keep", "some keep, inner", "some inside"} <= {*other_methods()} and "some inside, inner" not in here
    assert not any(arm.method in other_methods() for arm in ours)
    assert {"fastv", "fastvid"} <= {*other_methods()}
    assert {arm.method for arm in arms((0.1,), ("fastv",))} == {ALL_TOKENS, "fastv"}
    assert {arm.method for arm in arms((0.1,), ("fastvi",))} == {ALL_TOKENS, "fastvid", "fastvid, inner"}
    found = arms((0.25, 0.1), ("some keep", "some inside"))
    expected = ("some keep", "some keep, inner", "some inside")
    assert found == [Arm(ALL_TOKENS), *(Arm(name, ratio) for name in expected for ratio in (0.25, 0.1))]
    with pytest.raises(EarlyTomConfigError, match="no method begins so; there are all tokens, .*some keep, inner"):
        arms((0.1,), ("nobody's",))


def test_a_method_that_cannot_be_loaded_is_told_to_who_asks_for_it_alone(counted, monkeypatch, capsys):
    broken = EntryPoint("broken", "nowhere_to_be_found:METHOD", registry.GROUP)
    monkeypatch.setattr(registry, "_entry_points", lambda: (broken,))
    words = [*TOY, "--retain-ratios", "0.1", "--repeats", "0", "--methods"]
    assert main([*words, "random"]) == 0 and counted == [Arm(ALL_TOKENS), Arm("random tokens", 0.1)]
    assert main([*words, "all"]) == 2
    assert "method='broken' of another package cannot be loaded" in capsys.readouterr().err and len(counted) == 2


@pytest.fixture
def here(monkeypatch):
    """Names of rows, with two more methods: one keeps tokens behind the encoder, the other inside the model."""
    monkeypatch.setattr(registry, "_registered", {})
    registry.register_method(Method("some keep", "no paper", keep=lambda tokens, budget: None))
    registry.register_method(Method("some inside", "no paper", inside=lambda ratio, layers: (Step(1, ratio, "drop"),)))
    return {arm.method for arm in arms((0.1,), ("all",))}


def begins(name, beginning):
    """Letter by letter; a whole name is followed by a comma or nothing."""
    same = all(one == other for one, other in zip(name.ljust(len(beginning)), beginning, strict=False))
    return same and (beginning not in METHODS or name[len(beginning) :].startswith(",") or name == beginning)


@examples(60)
@given(st.lists(st.sampled_from(METHODS), min_size=1, unique=True), st.data())
def test_chosen_rows_are_those_of_the_full_table_in_its_order(names, data):
    beginnings = tuple(name[: data.draw(st.integers(1, len(name)))] for name in names)
    found = arms((0.25, 0.1), beginnings)
    expected = [
        arm
        for arm in arms((0.25, 0.1), ("all",))
        if arm.method == ALL_TOKENS or any(begins(arm.method, beginning) for beginning in beginnings)
    ]
    assert found == expected and found[0] == Arm(ALL_TOKENS)


def test_settings_are_tried_with_every_method_that_takes_them_behind_its_own_row():
    settings = [{"tau_reuse": 0.06}, {"tau_reuse": 0.06, "full_layers": (7,)}, {"tau_merge": 0.9}]
    reuse = [tuple(some.items()) for some in settings[:2]]
    found = arms((0.1,), ("only", "earlytom plus"), settings)
    expected = [
        Arm(ALL_TOKENS),
        *(Arm("only stage 1", None, more) for more in ((), (("tau_merge", 0.9),))),
        *(Arm(REUSE, None, more) for more in ((), *reuse)),
        *(Arm(name, 0.1, more) for name in ("earlytom plus", "earlytom plus, inner") for more in ((), *reuse)),
        *(Arm(PLUS_MERGING, 0.1, more) for more in ((), (("tau_merge", 0.9),))),
        *(Arm("only stage 2", 0.1, more) for more in ((), (("tau_merge", 0.9),))),
    ]
    assert found == expected
    with pytest.raises(EarlyTomConfigError, match="settings tau_reuse=0.06: none of these takes all of it: all tokens"):
        arms((0.1,), ("random",), settings)


@pytest.mark.parametrize(
    "more, rows",
    [
        (
            ["--variant", "paper"],
            [Arm(ALL_TOKENS), Arm("earlytom paper", 0.1), Arm("earlytom paper, inner", 0.1)],
        ),
        (["--methods", "no,random"], [Arm(ALL_TOKENS), Arm("no tokens"), Arm("random tokens", 0.1)]),
    ],
)
def test_only_chosen_rows_are_counted_and_shown(more, rows, counted, capsys):
    assert main([*TOY, "--retain-ratios", "0.1", *more]) == 0
    printed = capsys.readouterr().out
    assert counted == rows and all(arm.method in printed for arm in rows) and "average pooling" not in printed


def test_settings_of_a_row_win_over_options_of_all_and_stand_beside_it(counted, tmp_path, capsys):
    file = tmp_path / "eval.json"
    words = [*TOY, "--methods", "only reuse", "--json", str(file), "--try", "tau_reuse=0.06 full_layers=5,7"]
    assert main([*words, "--try", "encode_ratio=0.5"]) == 0
    printed = capsys.readouterr().out
    assert "only reuse, tau_reuse=0.06, full_layers=5,7" in printed and "only reuse, encode_ratio=0.5" in printed
    of_reuse = {"variant": "plus", "retain_ratio": 1.0}
    assert counted.options[1:] == [
        of_reuse,
        {**of_reuse, "tau_reuse": 0.06, "full_layers": (5, 7)},
        {**of_reuse, "encode_ratio": 0.5},
    ]
    rows = json.loads(file.read_text())["results"]
    assert [row["settings"] for row in rows[1:]] == [
        {},
        {"tau_reuse": 0.06, "full_layers": [5, 7]},
        {"encode_ratio": 0.5},
    ]
    # What is known already is not counted again, whatever else is tried.
    assert main([*words, "--try", "tau_reuse=0.02", "--resume"]) == 0
    assert counted[4:] == [Arm(REUSE, None, (("tau_reuse", 0.02),))]
    plus = ["--variant", "plus", "--retain-ratios", "0.1", "--full-layers", "5", "--try", "full_layers=7"]
    assert main([*TOY, *plus]) == 0
    # All tokens; plus with the option of all and with that of its row, and both with inner merging; merging.
    assert [given.get("full_layers") for given in counted.options[-6:]] == [None, (5,), (7,), (5,), (7,), None]


def test_ctrl_c_saves_finished_rows_and_resume_counts_the_rest(counted, tmp_path, capsys):
    untimed = [*TOY, "--repeats", "0", "--retain-ratios", "0.1"]
    file, words = tmp_path / "eval.json", [*untimed, "--methods", "top,random", "--json"]
    counted.stop_at = 2
    assert main([*words, str(file)]) == 130
    assert f"stopped: {file} has 2 of 3 rows;" in " ".join(capsys.readouterr().err.split())
    saved = json.loads(file.read_text())["results"]
    assert [evaluate.arm_of(row) for row in saved] == [Arm(ALL_TOKENS), Arm("top-k without decoupling", 0.1)]
    counted.stop_at = None
    assert main([*words, str(file), "--resume"]) == 0
    assert counted == [Arm(ALL_TOKENS), Arm("top-k without decoupling", 0.1), Arm("random tokens", 0.1)]
    resumed, table = json.loads(file.read_text()), capsys.readouterr().out
    assert resumed["results"][:2] == saved
    # Another ratio, another method: rows do not depend on each other.
    assert main([*untimed, "--methods", "top,average", "--json", str(file), "--resume"]) == 0
    assert counted[3:] == [Arm("average pooling", 0.1)]
    kept = {evaluate.arm_of(row) for row in json.loads(file.read_text())["results"]}
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
    settings = (("tau_reuse", 0.06), ("full_layers", (5, 7)))[: rng.integers(3)]
    arm = Arm("only reuse", 0.1 if rng.integers(2) else None, settings)
    row = Result(arm, Cost(12.5, 11.0, 0.4, 3e8), asked & (rng.random(asked.shape) < 0.5), asked, (0.5, 0.25))
    again = Result.from_dict(json.loads(json.dumps({**row.to_dict(), "interval": None})))
    assert (again.arm, again.cost, again.ttft) == (row.arm, row.cost, row.ttft)
    assert np.array_equal(again.right, row.right) and np.array_equal(again.asked, row.asked)


TIMED = [Arm(ALL_TOKENS), Arm(SUBSAMPLING, 0.25), Arm(SUBSAMPLING, 0.1)]


CALLS = VIDEOS * len(TIMED)


# Before the first, between two rows of a video, between two videos, and never.
@pytest.mark.parametrize("stop_at", cases((0,), (4,), (6,), (CALLS,), among=[(call,) for call in range(CALLS + 1)]))
def test_wherever_timing_is_stopped_the_rest_is_timed_and_nothing_twice(stop_at, counted, tmp_path, capsys):
    file, whole, calls = tmp_path / "eval.json", stop_at // len(TIMED), CALLS
    words = [*TOY, "--methods", "frame s", "--retain-ratios", "0.25,0.1", "--json", str(file)]
    counted.stop_at_call = stop_at
    assert main(words) == (130 if stop_at < calls else 0)
    said = f"has 3 of 3 rows, timed on {whole} video{'s' if whole > 1 else ''};" if whole else "has 3 of 3 rows;"
    assert (said in " ".join(capsys.readouterr().err.split())) == (stop_at < calls)
    before = json.loads(file.read_text())["results"]
    assert [len(row["ttft"]) for row in before] == [whole] * len(TIMED)
    counted.called, counted.stop_at_call = [], None
    assert main([*words, "--resume"]) == 0
    for row, earlier in zip(json.loads(file.read_text())["results"], before, strict=True):
        assert len(row["ttft"]) == VIDEOS and row["ttft"][:whole] == earlier["ttft"]
    # All rows on a video in turn.
    asked = [question for _, question in counted.called]
    assert [arm for arm, _ in counted.called] == TIMED * (VIDEOS - whole)
    assert all(asked[i] == asked[i - i % len(TIMED)] for i in range(len(asked)))


def test_rows_of_the_specification_are_not_timed(counted, tmp_path, capsys):
    file = tmp_path / "eval.json"
    words = [*TOY, "--retain-ratios", "0.1", "--json", str(file)]
    assert main([*words, "--methods", "no tokens,random,only stage 2,earlytom paper"]) == 0
    times = {row["method"]: len(row["ttft"]) for row in json.loads(file.read_text())["results"]}
    assert times == {
        **dict.fromkeys(("no tokens", "random tokens", "only stage 2"), 0),
        **dict.fromkeys((ALL_TOKENS, "earlytom paper", "earlytom paper, inner"), VIDEOS),
    }
    # More methods later: their videos are timed, and those of the others stay.
    before, counted.called = json.loads(file.read_text())["results"], []
    assert main([*words, "--methods", "earlytom paper,frame s", "--resume"]) == 0
    after = {row["method"]: row["ttft"] for row in json.loads(file.read_text())["results"]}
    assert all(after[row["method"]] == row["ttft"] for row in before) and len(after[SUBSAMPLING]) == VIDEOS
    assert {arm for arm, _ in counted.called} == {Arm(SUBSAMPLING, 0.1)}


@pytest.fixture
def seeds(tmp_path):
    """Two folders with the same checkpoint."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.symlink_to(WEIGHTS, target_is_directory=True)
    return [str(folder) for folder in folders]


def test_each_model_is_asked_every_row_and_what_is_missing_alone_is_asked_again(counted, seeds, tmp_path, capsys):
    file, rows = tmp_path / "eval.json", [Arm(ALL_TOKENS), Arm("random tokens", 0.1)]
    words = [*TOY, "--retain-ratios", "0.1", "--methods", "random", "--json", str(file)]
    first, second = ([*words, "--resume", "--model", seed] for seed in seeds)
    assert main(first) == 0 and counted == rows
    alone = json.loads(file.read_text())
    assert [row["model"] for row in alone["results"]] == seeds[:1] * 2 and "over models" not in alone
    assert "each model" not in capsys.readouterr().out
    both = [*first, "--model", seeds[1]]
    counted.stop_at = 3
    assert main(both) == 130
    assert "has 3 of 4 rows, timed on 4 videos;" in " ".join(capsys.readouterr().err.split())
    counted.stop_at = None
    assert main(both) == 0 and counted == [*rows, *rows]
    assert "each model" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["results"][:2] == alone["results"] and found["models"] == seeds
    assert [row["model"] for row in found["results"]] == [seeds[0]] * 2 + [seeds[1]] * 2
    for mean, one, other in zip(found["over models"], found["results"], found["results"][2:], strict=False):
        assert mean["each model"] == [one["accuracy"], other["accuracy"]] and "answers" not in mean
        assert mean["accuracy"] == pytest.approx((one["accuracy"] + other["accuracy"]) / 2)
    # What another model said stays in the file, and out of the table.
    assert main(second) == 0 and len(counted) == 4 and "each model" not in capsys.readouterr().out
    assert len(json.loads(file.read_text())["results"]) == 4


def test_pareto_chooses_rows_and_says_what_nothing_beats(counted, tmp_path, capsys):
    file, folder = tmp_path / "pareto.json", tmp_path / "plots"
    words = [*TOY, "--pareto", "--methods", "frame,average,earlytom plus,random", "--json", str(file)]
    assert main([*words, "--markdown", str(tmp_path / "pareto.md"), "--plot", str(folder)]) == 0
    expected = [
        arm
        for arm in pareto_rows.arms()
        if arm.method in (ALL_TOKENS, "random tokens", RUNS, *BASELINES) or arm.method.startswith("earlytom plus")
    ]
    assert counted == expected and {Arm("random tokens", ratio) for ratio in evaluate.RATIOS} <= {*counted}
    content = json.loads(file.read_text())
    assert list(map(evaluate.arm_of, content["pareto"])) == expected
    # All cost the same operations here: the best of them are on that front.
    best = max(row["accuracy"] for row in content["pareto"])
    assert all(("MFLOP" in row["front"]) == (row["accuracy"] == best) for row in content["pareto"])
    table = (tmp_path / "pareto.md").read_text()
    assert "plus ahead at equal MFLOP" in table and "| frame subsampling, frames=3 |" in table
    assert "frames in runs, tau_run=0.8" in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["pareto.png"]


@pytest.mark.parametrize(
    "more, says",
    [
        (["--videos", "5"], "videos=4, and this would be videos=5"),
        (["--split", "validation"], "split='test', and this would be split='validation'"),
        (["--tau-merge", "0.9"], "tau_merge=None, and this would be tau_merge=0.9"),
        (["--noise", "0.1"], "noise=0.0, and this would be noise=0.1"),
        (["--encoded"], "encoded=False, and this would be encoded=True"),
    ],
)
def test_rows_of_other_videos_or_options_are_refused(more, says, counted, tmp_path, capsys):
    words = [*TOY, "--methods", "only stage 2", "--retain-ratios", "0.1", "--json", str(tmp_path / "eval.json")]
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
        (["--variant", "plus", "--full-layers", "8"], "full_layers=(8,): layer 8 does not exist"),
        (["--try", "full_layers=7,9"], "full_layers=(7, 9): layer 9 does not exist"),
        (["--variant", "plus", "--tau-merge", "0.9"], "tau_merge=0.9 with variant="),
        (["--variant", "paper", "--tau-reuse", "0.1"], "tau_reuse=0.1 without reuse"),
        (["--methods", "earlytom paper", "--tau-reuse", "0.1"], "tau_reuse=0.1: none of these takes it"),
        (["--try", "tau_reuse=-1"], "tau_reuse=-1.0: must be"),
        (["--try", "tau=1"], "unknown option 'tau'; did you mean"),
        (["--try", "tau_reuse"], "tau_reuse must be there once, as tau_reuse=VALUE"),
        (["--try", ""], "name at least one option"),
        (["--try", "retain_ratio=0.5"], "none of these takes all of it"),
        (["--noise", "-1"], "noise=-1.0: must be"),
        (["--repeats", "-1"], "repeats=-1: must be"),
        (["--method", "x"], "method='x': must be one of"),
        (["--method", "earlytom"], "method='earlytom' with --toy, where methods are rows: name them with --methods"),
        (["--inner-layer", "4"], "inner_layer=4: the language model has layers 0 to 3"),
        (["--methods", "random", "--inner-layer", "2"], "inner_layer=2: none of these takes it"),
        (["--resume"], "--resume without --json FILE"),
        (["--pareto", "--methods", "xyz"], "methods='xyz': no method begins so"),
        (["--pareto", "--try", "frames=3"], "unknown option 'frames'"),
        (["--model", "a", "--model", "b", "--model", "a"], "model='a' is given twice"),
        (["--model", str(WEIGHTS), "--model", "/nowhere"], "/nowhere"),
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

    def evaluated(model, questions, arm, options=None, answered=lambda videos: None, compress=None):
        done.append((*arm[:2], len(questions.asked)))
        asked = np.ones((len(questions.asked), len(CATEGORIES)), bool)
        return Result(arm, Cost(1.0, 1.0, 1.0, 1.0), asked, asked)

    monkeypatch.setattr(evaluate, "evaluate", evaluated)
    assert main([*TOY, "--methods", "random", "--retain-ratios", "0.1", "--repeats", "0"]) == 0
    assert "2 rows, 4 videos: less than a minute (measured with 4 of them)" in capsys.readouterr().err
    assert done == [(ALL_TOKENS, None, 1), (ALL_TOKENS, None, 4), (ALL_TOKENS, None, 4), ("random tokens", 0.1, 4)]
