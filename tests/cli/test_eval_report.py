"""The tables of ``earlytom eval --tasks``: averages, shares of the full model's score, and what is left open."""

import dataclasses
import json

import pytest

from earlytom_compile.cli.eval_report import Cell, Report
from earlytom_compile.cli.eval_score import Score
from earlytom_compile.shapes import shape_of

SHAPE = shape_of("llava-onevision-7b")


def cell(task, ratio, value, *, stderr=None, samples=100, empty=0, better=True, frames=32, left=None, **costs):
    kept = round(6272 * (ratio or 1))
    known = {
        "retain_ratio": ratio or 1.0, "ttft_ms": 900.0 if ratio is None else 400.0, "video_frames": frames,
        "stage1_retention": left or (1.0 if ratio is None else 0.739), "video_tokens": 6272.0,
        "video_tokens_kept": float(kept), "frames_per_second": 40.0, **costs,
    }  # fmt: skip
    options = {} if ratio is None else {"lowering": "eager", "variant": "plus", "reuse": "patches_computed" in costs}
    settings = "" if ratio is None else "default"
    score = Score("acc,none", value, stderr, samples, empty, higher_is_better=better)
    return Cell(task, ratio, settings, options, score, known, 24.0, 60.0, {task: {"acc,none": value}}, "", "now")


# The paper's Table 1: accuracies of the full model and at 10 %, and what it says of them.
TABLE_1 = {"mvbench": (58.3, 56.5), "egoschema": (60.4, 60.1), "longvideobench": (56.4, 52.4), "videomme": (58.6, 55.8)}


def test_averages_are_those_of_table_1():
    cells = [cell(task, None, full) for task, (full, _) in TABLE_1.items()]
    cells += [cell(task, 0.1, cut) for task, (_, cut) in TABLE_1.items()]
    full, cut = Report(cells, SHAPE, None).rows()
    assert (round(full["score"], 1), round(cut["score"], 1)) == (58.4, 56.2)
    assert (full["of_full_score"], round(100 * cut["of_full_score"], 1)) == (1.0, 96.2)
    assert full["scores"] == {task: pytest.approx(value) for task, (value, _) in TABLE_1.items()}
    assert (full["method"], cut["method"]) == ("all tokens", "earlytom plus")
    assert round(full["tflop"], 1) == 82.6 and cut["of_full_tflop"] == pytest.approx(cut["tflop"] / full["tflop"])


def test_work_is_what_earlytom_flops_counts_with_the_same_share(earlytom):
    status, printed, _ = earlytom("flops", "--retain-ratios", "0.1", "--json", "-")
    (other,) = [row for row in json.loads(printed)["rows"] if row["method"] == "EarlyTom"]
    rows = Report([cell("a", None, 0.5), cell("a", 0.1, 0.4)], SHAPE, None).rows()
    assert status == 0 and rows[1]["tflop"] == pytest.approx(other["total"] / 1e12)


def test_work_of_reused_patches_is_what_earlytom_flops_counts_with_the_same_share(earlytom):
    status, printed, _ = earlytom("flops", "--retain-ratios", "0.1", "--encode-ratio", "0.25", "--json", "-")
    (other,) = [row for row in json.loads(printed)["rows"] if row["method"] == "EarlyTom plus"]
    report = Report([cell("a", None, 0.5), cell("a", 0.1, 0.4, left=1.0, patches_computed=0.25)], SHAPE, None)
    assert status == 0 and report.rows()[1]["tflop"] == pytest.approx(other["total"] / 1e12)
    ((_, _, _), (_, headings, rows)) = report.sections()
    assert [row[headings.index("patches")] for row in rows] == ["–", "25.0%"]


@pytest.mark.parametrize(
    "options, name, row",
    [
        ({"method": "visionzip"}, "visionzip", "VisionZip"),
        ({"method": "holitom", "inner_layer": 18}, "holitom, inner", "HoliTom"),
        ({"variant": "paper", "inner_layer": 18}, "earlytom paper, inner", "EarlyTom + inner"),
    ],
)
def test_work_of_methods_and_inner_merging_is_what_earlytom_flops_counts(earlytom, options, name, row):
    status, printed, _ = earlytom("flops", "--retain-ratios", "0.1", "--json", "-")
    other = {each["method"]: each["total"] for each in json.loads(printed)["rows"]}
    cut = cell("a", 0.1, 0.4, left=1.0 if "method" in options else None)
    rows = Report([cell("a", None, 0.5), dataclasses.replace(cut, options=options)], SHAPE, None).rows()
    assert rows[1]["method"] == name
    assert status == 0 and rows[1]["tflop"] == pytest.approx(other[row] / 1e12, rel=1e-5)


def test_shares_and_percentages_are_averaged_as_percentages():
    cells = [cell("share", None, 0.5, stderr=0.01), cell("percent", None, 70.0, stderr=2.0)]
    cells += [cell("share", 0.1, 0.0, stderr=0.0), cell("percent", 0.1, 0.5, stderr=0.3)]
    report = Report(cells, SHAPE, None)
    assert [row["score"] for row in report.rows()] == [60.0, 0.25]
    assert [report.stderr(each) for each in cells] == [1.0, 2.0, 0.0, 0.3]


def test_nothing_stands_without_the_full_models_number():
    report = Report([cell("a", None, 0.5), cell("a", 0.1, 0.4), cell("b", 0.1, 0.9)], SHAPE, None)
    assert report.tasks == ["a"] and [each["task"] for each in report.to_dict()["evaluations"]] == ["a", "a"]
    assert Report([cell("b", 0.1, 0.9)], SHAPE, None).rows() == []


def test_a_row_with_gaps_has_no_average():
    cells = [cell("a", None, 0.5), cell("b", None, 0.6), cell("b", 0.1, 0.4)]
    full, cut = Report(cells, SHAPE, None).rows()
    assert full["score"] == pytest.approx(55.0)
    assert cut["scores"] == {"a": None, "b": 40.0}
    assert all(cut[name] is None for name in ("score", "of_full_score", "ttft_ms", "tflop"))


def test_what_was_not_measured_is_a_dash_and_no_zero():
    bare = cell("a", None, 0.0)
    bare.costs.clear()
    report = Report([bare, cell("a", 0.1, 0.2)], None, None)
    (_, _, (full, cut)), (_, _, details) = report.sections()
    assert full == ("all tokens", "100%", "–", "–", "–", "24.0", "0.0", "0.0", "–")
    assert cut[2:6] == ("–", "–", "400", "24.0") and cut[-1] == "–"
    assert details[0] == ("a", "100%", "", "0.0", "–", "100", "–", "–", "–", "–", "–", "60")


def test_lower_is_better_is_told_and_not_averaged():
    cells = [cell("a", None, 0.5), cell("errors", None, 0.1, better=False)]
    cells += [cell("a", 0.1, 0.4), cell("errors", 0.1, 0.3, better=False)]
    report = Report(cells, SHAPE, None)
    assert [row["score"] for row in report.rows()] == [50.0, 40.0] and report.of_full(cells[3]) is None
    assert "Lower is better in errors, which is not part of the score." in report.notes()


def test_notes_say_what_a_reader_must_know():
    compiled = cell("a", 0.1, 0.4, empty=3)
    compiled.options["lowering"] = "staged"
    notes = " ".join(Report([cell("a", None, 0.5), compiled], SHAPE, 20).notes())
    for said in ("a: acc", "the first 20 questions", "do not compare", "a, 10%: 3 answers of 100 empty", "Table 8"):
        assert said in notes
    assert Report([cell("a", None, 0.5)], SHAPE, None).notes() == [
        "Scores are lmms-eval's: a: acc; ± one standard error where it gives one."
    ]


def test_everything_comes_back_from_json():
    cells = [cell("a", None, 0.5, stderr=0.1), cell("a", 0.125, 0.4)]
    report = Report(cells, SHAPE, None)
    saved = json.loads(json.dumps(report.to_dict()))
    assert [Cell.from_dict(content) for content in saved["evaluations"]] == cells
    assert saved["evaluations"][0]["percent"] == 50.0 and saved["evaluations"][0]["stderr_percent"] == 10.0


def test_markdown_has_command_versions_and_every_number():
    about = {"command": "earlytom eval --tasks a", "machine": "M", "lmms-eval": "0.7.3", "limit": None}
    text = Report([cell("a", None, 0.5, stderr=0.012), cell("a", 0.125, 0.4)], SHAPE, None).to_markdown(about)
    assert text.startswith("`earlytom eval --tasks a`\n\nmachine M, lmms-eval 0.7.3\n")
    assert "| a | 100% |  | 50.0 ± 1.2 | 100.0% | 100 | 900 | 100.0% | – | 6272 -> 6272 | 40.0 | 60 |" in text
    assert "| a | 12.5% | default | 40.0 | 80.0% | 100 | 400 | 73.9% | – | 6272 -> 784 | 40.0 | 60 |" in text
