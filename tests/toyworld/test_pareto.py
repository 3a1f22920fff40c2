"""What nothing beats and how far a curve is ahead, beside brute force; rows over several models; table and picture."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from effort import examples
from hypothesis import assume, given
from hypothesis import strategies as st

from earlytom_compile.cli.main import main
from earlytom_compile.toyworld import evaluate, pareto_plot, pareto_report, pareto_rows, report, timing
from earlytom_compile.toyworld.baselines import AVERAGING, BASELINES, POOLING, SUBSAMPLING
from earlytom_compile.toyworld.checkpoint import build_model
from earlytom_compile.toyworld.evaluate import Arm, Cost, Result
from earlytom_compile.toyworld.installed import REUSE
from earlytom_compile.toyworld.language import build_tokenizer
from earlytom_compile.toyworld.merging import RUNS
from earlytom_compile.toyworld.methods import ALL_TOKENS, STAGE_1, taken
from earlytom_compile.toyworld.model import SHAPE, save
from earlytom_compile.toyworld.pareto import ahead, flops_of, front, mixture, on_front, ttft_of
from earlytom_compile.toyworld.pareto_rows import OF_PLUS, PAPER, PLUS
from earlytom_compile.toyworld.seeds import OverModels, over_models

# Few different numbers, so that costs and accuracies tie.
POINTS = st.lists(st.tuples(st.integers(1, 6).map(float), st.integers(0, 5).map(lambda five: five / 5)), max_size=8)
ASKED = np.ones((30, 5), bool)


def row(name, flops, right=0.7, ttft=(), seed=0, ratio=None, settings=()):
    answers = np.random.default_rng([seed, round(flops)]).random(ASKED.shape) < right
    return Result(Arm(name, ratio, settings), Cost(13.0, 11.0, 0.5, flops), answers, ASKED, ttft)


@given(POINTS)
def test_on_the_front_is_what_no_other_has_at_no_more_cost(points):
    found = front([cost for cost, _ in points], [accuracy for _, accuracy in points])
    for (cost, accuracy), kept in zip(points, found, strict=True):
        others = [other for other in points if other != (cost, accuracy)]
        assert kept == (not any(c <= cost and a >= accuracy for c, a in others))


@given(POINTS, st.integers(0, 7))
def test_what_was_not_timed_is_on_no_front_and_changes_none(points, place):
    costs, accuracies = [cost for cost, _ in points], [accuracy for _, accuracy in points]
    found = front([*costs[:place], None, *costs[place:]], [*accuracies[:place], 1.0, *accuracies[place:]])
    assert found.pop(min(place, len(points))) is False and found == front(costs, accuracies)


def height(points, cost):
    """Of the curve at ``cost``, from every pair of points: the front is what no point lies above and before."""
    best = [point for point in points if not any(c <= point[0] and a > point[1] for c, a in points)]
    best = sorted({(c, a) for c, a in best if not any(other < c and a <= high for other, high in points)})
    if cost >= best[-1][0]:
        return best[-1][1]
    ((x, low), (x_next, high)) = next(pair for pair in zip(best, best[1:], strict=False) if cost < pair[1][0])
    return low + (high - low) * (cost - x) / (x_next - x)


@examples(200)
@given(POINTS, st.floats(0.5, 6.5))
def test_a_cost_is_met_by_shares_of_two_points_of_the_front(points, cost):
    costs, accuracies = [c for c, _ in points], [a for _, a in points]
    parts = mixture(costs, accuracies, cost)
    if not points or not min(costs) <= cost <= max(costs):
        assert parts == []
        return
    shares = [share for _, share in parts]
    assert 1 <= len(parts) <= 2 and sum(shares) == pytest.approx(1) and all(0 <= share <= 1 for share in shares)
    assert sum(share * accuracies[place] for place, share in parts) == pytest.approx(height(points, cost))
    assert sum(share * costs[place] for place, share in parts) <= cost + 1e-9
    assert all(front(costs, accuracies)[place] for place, _ in parts)


@examples(40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True), st.integers(1, 9), st.integers(0, 99))
def test_how_far_a_curve_is_ahead_is_the_difference_of_accuracies(costs, cost, seed):
    plus = [row(PLUS, 1e8 * each, 0.3 + each / 15, seed=seed) for each in costs]
    other = row("other", 1e8 * cost, seed=seed + 1)
    lead = ahead(plus, other, flops_of)
    if not min(costs) <= cost <= max(costs):
        assert lead is None
        return
    points = [(each.cost.flops, each.accuracy()) for each in plus]
    assert lead.points == pytest.approx(height(points, other.cost.flops) - other.accuracy())
    assert lead.low <= lead.points + 1e-12 and lead.points <= lead.high + 1e-12


def test_of_answers_to_the_same_questions_only_what_differs_is_uncertain():
    """Beside itself a row is not ahead at all; beside one that is wrong on a third of the videos, by chance alone."""
    plus, same = row(PLUS, 1e8), row("same", 1e8)
    lead = ahead([plus], same, flops_of)
    assert (lead.points, lead.low, lead.high) == (0, 0, 0)
    worse = Result(same.arm, same.cost, same.right & (np.arange(30) % 3 > 0)[:, None], ASKED)
    lead = ahead([plus], worse, flops_of)
    spread = np.std((plus.right & ~worse.right).sum(1) / 5) / math.sqrt(30)
    assert lead.points == pytest.approx(plus.accuracy() - worse.accuracy())
    assert lead.high - lead.low == pytest.approx(2 * 1.96 * spread, rel=0.2)


def test_time_is_a_cost_where_it_was_measured():
    fast, slow, never = row(PLUS, 2e8, ttft=(1.0, 3.0, 2.0)), row(PLUS, 1e8, 0.9, ttft=(5.0,)), row("other", 1e8)
    assert [ttft_of(one) for one in (fast, slow, never)] == [2.0, 5.0, None]
    assert on_front([fast, slow, never], ttft_of) == [True, True, False]
    assert ahead([fast, slow], never, ttft_of) is None and ahead([never], fast, ttft_of) is None


# --- Several models ---------------------------------------------------------------------------------


@examples(30)
@given(st.integers(1, 4), st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_over_models_the_mean_stands_and_its_interval_is_a_bootstrap_over_videos(models, videos, seed):
    rng = np.random.default_rng(seed)
    asked = rng.random((videos, 5)) < 0.7
    assume(asked.any())
    answers = [asked & (rng.random(asked.shape) < 0.6) for _ in range(models)]
    each = [
        Result(Arm("some", 0.1), Cost(1.0, 2.0, 0.5, 1e8 * (n + 1)), right, asked, (float(n),))
        for n, right in enumerate(answers)
    ]
    found = over_models(each)
    assert found.accuracy() == pytest.approx(np.mean([one.accuracy() for one in each]))
    for category in found.categories:
        expected = np.mean([one.accuracy(category) for one in each])
        assert found.accuracy(category) == pytest.approx(expected, nan_ok=True)
    assert found.cost.flops == pytest.approx(1e8 * (models + 1) / 2) and found.ttft == tuple(range(models))
    if models > 1:
        assert found.each == tuple(each)
    low, high = found.interval()
    assert np.isnan(low) if asked.any(1).sum() < 2 else low <= found.accuracy() <= high


def test_videos_are_drawn_once_for_all_models():
    """Models that are right about the same videos are no more certain than one; about opposite ones, they are."""
    right = np.zeros((200, 5), bool)
    right[::2] = True
    asked = np.ones_like(right)
    one, same, other = (Result(Arm("some"), Cost(1, 1, 1, 1), answers, asked) for answers in (right, right, ~right))
    assert over_models([one, same]).interval() == pytest.approx(one.interval())
    assert over_models([one, other]).interval() == (0.5, 0.5)
    drawn = np.random.default_rng(1).integers(0, 200, (4000, 200))
    expected = np.percentile(right[drawn].mean((1, 2)), [2.5, 97.5])
    assert one.interval() == pytest.approx(expected, abs=0.01)


def test_models_that_were_asked_something_else_are_refused():
    with pytest.raises(AssertionError, match="different questions"):
        over_models([row("some", 1e8), Result(Arm("some"), Cost(1, 1, 1, 1), ASKED[:5], ASKED[:5])])


# --- Rows -------------------------------------------------------------------------------------------


def test_rows_are_every_method_at_every_ratio_and_what_else_can_be_chosen():
    found = pareto_rows.arms()
    assert found[0] == Arm(ALL_TOKENS) and len(set(found)) == len(found)
    assert {arm for arm in evaluate.arms(evaluate.RATIOS, ("all",)) if arm.method not in BASELINES} <= {*found}
    of = {name: [arm for arm in found if arm.method == name] for name in {arm.method for arm in found}}
    assert {arm.retain_ratio for arm in of[PLUS]} >= {0.5, 0.35, *evaluate.RATIOS}
    for name in (SUBSAMPLING, AVERAGING):
        assert {dict(arm.settings)["frames"] for arm in of[name] if len(arm.settings) == 1} == {*range(1, 8)}
    for name in (REUSE, STAGE_1, PLUS, PAPER, RUNS, POOLING):
        assert sum(bool(arm.settings) for arm in of[name]) >= 5
    assert {arm.retain_ratio for arm in of[RUNS]} == {None, *pareto_rows.FEW_RATIOS}
    assert {arm.retain_ratio for arm in pareto_rows.arms((0.3,)) if arm.method == "fastv"} == {0.3}


def test_each_row_is_told_from_the_others_by_what_its_method_takes():
    for arm in pareto_rows.arms():
        assert taken(arm.method, dict(arm.settings)) == dict(arm.settings)
        assert evaluate.arm_of(json.loads(json.dumps(arm_row(arm).to_dict()))) == arm
    untimed = {arm.method for arm in pareto_rows.arms() if not timing.can_be_called(arm)}
    assert untimed == {"no tokens", "only stage 2", "top-k without decoupling", "random tokens"}


def arm_row(arm):
    return Result(arm, Cost(1, 1, 1, 1), ASKED, ASKED)


def test_rows_of_two_models_are_counted_timed_and_drawn(tmp_path, capsys):
    shape, tokenizer = replace(SHAPE, vision_layers=2, text_layers=1), build_tokenizer()
    folders = [str(save(build_model(shape, tokenizer, seed=seed), tmp_path / str(seed))) for seed in (1, 2)]
    models = [word for folder in folders for word in ("--model", folder)]
    words = ["eval", "--toy", "--pareto", "--methods", "average pooling", "--videos", "3", "--repeats", "1"]
    file, plots = tmp_path / "a.json", tmp_path / "plots"
    assert main([*words, *models, "--device", "cpu", "--json", str(file), "--plot", str(plots)]) == 0
    content = json.loads(file.read_text())
    assert {row["model"] for row in content["results"]} == {*folders} and (plots / "pareto.png").exists()
    assert len(content["results"]) == 2 * len(content["pareto"]) == 2 * len(content["over models"]) > 10
    assert all(len(row["ttft"]) == 1 for row in content["results"])
    flops = {row["flops"] for row in content["pareto"]}
    assert len(flops) == len(content["pareto"])
    cheapest = min(content["pareto"], key=lambda row: row["flops"])
    assert "MFLOP" in cheapest["front"] and "each model" in capsys.readouterr().out


# --- Table and picture ------------------------------------------------------------------------------

ROWS = [
    row(ALL_TOKENS, 9e8, 0.95, (0.02,)),
    row(PLUS, 4e8, 0.9, (0.01,), ratio=0.25),
    row(PLUS, 3e8, 0.8, (0.008,), ratio=0.1),
    row(REUSE, 6e8, 0.95, (0.03,)),
    row("fastv", 5e8, 0.5, (0.009,), ratio=0.1),
    row("random tokens", 2e8, 0.4, ratio=0.1),
]


def test_the_table_says_what_is_on_the_front_and_how_far_plus_is_ahead():
    cells = {(line[0], line[1]): line for line in pareto_report.rows(ROWS)}
    heading = pareto_report.headings(ROWS)
    assert all(len(line) == len(heading) for line in cells.values())
    fastv, unknown, plus = cells["fastv", "10%"], cells["random tokens", "10%"], cells[PLUS, "10%"]
    lead = ahead(ROWS[1:4], ROWS[4], flops_of)
    assert fastv[-2] == f"{100 * lead.points:.1f} ({100 * lead.low:.1f} to {100 * lead.high:.1f})"
    assert fastv[-3] == "" and plus[-3:] == ("MFLOP, TTFT", "", "")
    assert unknown[5] == "–" and unknown[-3:] == ("MFLOP", "–", "–")
    text = pareto_report.to_markdown(ROWS, {"command": "c"})
    assert "150 questions about 30 videos:" in text and all(" | ".join(line) in text for line in cells.values())
    content = pareto_report.to_list(ROWS)
    json.dumps(report.without_nan(content), allow_nan=False)
    assert content[4]["plus ahead"]["MFLOP"] == [lead.points, lead.low, lead.high]
    assert [each["front"] for each in content[4:]] == [[], ["MFLOP"]] and content[1]["plus ahead"]["MFLOP"] is None


def test_over_several_models_each_ones_accuracy_stands_beside_the_mean():
    rows = [over_models([one, row(one.arm.method, one.cost.flops, seed=1, ratio=one.arm.retain_ratio)]) for one in ROWS]
    assert isinstance(rows[0], OverModels)
    (line, *_), heading = pareto_report.rows(rows), pareto_report.headings(rows)
    each = " ".join(f"{100 * one.accuracy():.1f}" for one in rows[0].each)
    assert line[heading.index("each model")] == each
    assert report.title(rows) == "150 questions about 30 videos, each model of 2"


def test_the_picture_has_every_row_where_its_numbers_are(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pareto_plot.draw(pyplot, ROWS)
    flops, ttft = figure.axes
    for axes, cost_of, unit in ((flops, flops_of, 1e-6), (ttft, ttft_of, 1e3)):
        drawn = {
            (container.get_label(), *point)
            for container in axes.containers
            for point in container[0].get_xydata().tolist()
        }
        expected = {
            (pareto_plot.group(one), unit * cost, one.accuracy()) for one in ROWS if (cost := cost_of(one)) is not None
        }
        assert drawn == expected
    styles = pareto_plot.point_styles(list({pareto_plot.group(arm_row(arm)) for arm in pareto_rows.arms()}))
    assert len({(style["color"], style["marker"]) for style in styles.values()}) == len(styles)
    assert {pareto_plot.group(row(name, 1e8)) for name in OF_PLUS} == {"plus"}
    pyplot.close(figure)
    written = pareto_plot.write_plot(ROWS[:1], tmp_path / "new")
    assert written.read_bytes().startswith(b"\x89PNG")
