"""The one number that a task of lmms-eval comes to: metric, unit, error, and how many questions."""

import math

import pytest
from effort import examples
from hypothesis import given
from hypothesis import strategies as st

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.cli.eval_score import score_of, unit_of


def found(leaves, *, own=None, metric="accuracy", better=True, samples=None, counts=None):
    """What ``simple_evaluate`` returns for a task or, with several ``leaves``, for the group "group"."""
    own = {} if own is None else {"group": {"alias": "group", **own}}
    return {
        "results": {**own, **{name: {"alias": name, **values} for name, values in leaves.items()}},
        "configs": {name: {"task": name, "metric_list": [{"metric": metric}]} for name in leaves},
        "n-samples": {name: {"original": 900, "effective": (counts or {}).get(name, 100)} for name in leaves},
        "higher_is_better": {name: {metric: better} for name in leaves},
        "samples": samples or {},
    }


def test_a_share_with_its_own_error():
    values = {"acc,none": 0.9, "acc_stderr,none": 0.03, "acc_stderr_clt,none": 0.04, "other,none": 7.0}
    score = score_of(found({"toy": values}, metric="acc"), "toy")
    assert (score.metric, score.value, score.stderr, score.samples) == ("acc,none", 0.9, 0.03, 100)
    assert score.subtasks == () and score.higher_is_better


def test_a_percentage_whose_error_is_one_of_ones_and_zeros():
    values = {"m,none": 58.4, "m_stderr,none": "N/A", "m_stderr_clt,none": 0.02, "m_stderr_clustered,none": 0.03}
    assert score_of(found({"videomme": values}, metric="m"), "videomme").stderr == 3.0
    del values["m_stderr_clustered,none"]
    assert score_of(found({"videomme": values}, metric="m"), "videomme").stderr == 2.0
    values["m_stderr_clt,none"] = "N/A"
    assert score_of(found({"videomme": values}, metric="m"), "videomme").stderr is None


def test_a_share_whose_error_is_one_of_ones_and_zeros():
    values = {"lvb_acc,none": 0.56, "lvb_acc_stderr,none": "N/A", "lvb_acc_stderr_clt,none": 0.02}
    assert score_of(found({"lvb": values}, metric="lvb_acc"), "lvb").stderr == 0.02


def test_a_group_without_a_metric_is_the_mean_of_its_tasks():
    leaves = {
        "b": {"acc,none": 50.0, "acc_stderr,none": "N/A", "acc_stderr_clt,none": 0.03},
        "a": {"acc,none": 80.0, "acc_stderr,none": "N/A", "acc_stderr_clt,none": 0.04},
    }
    score = score_of(found(leaves, own={" ": " "}, metric="acc", counts={"a": 200, "b": 3}), "group")
    assert (score.value, score.samples, score.subtasks) == (65.0, 203, ("a", "b"))
    assert score.stderr == pytest.approx(math.sqrt(3.0**2 + 4.0**2) / 2)
    del leaves["a"]["acc_stderr_clt,none"]
    assert score_of(found(leaves, own={" ": " "}, metric="acc"), "group").stderr is None


def test_a_tag_which_has_no_line_of_its_own_is_a_mean_too():
    leaves = {"a": {"acc,none": 0.2}, "b": {"acc,none": 0.4}}
    assert score_of(found(leaves, metric="acc"), "group").value == pytest.approx(0.3)


def test_a_group_with_a_metric_has_that_and_not_the_mean():
    leaves = {"a": {"acc,none": 0.2}, "b": {"acc,none": 0.4}}
    own = {"acc,none": 0.35, "acc_stderr,none": 0.01}
    score = score_of(found(leaves, own=own, metric="acc"), "group")
    assert (score.value, score.stderr, score.subtasks) == (0.35, 0.01, ("a", "b"))


def test_the_metric_that_the_task_names_first_and_no_other():
    values = {"z,none": 0.1, "accuracy,flexible": 0.3, "accuracy,none": 0.2, "accuracy_by_length,none": 0.9}
    assert score_of(found({"toy": values}), "toy").value == 0.2
    del values["accuracy,none"]
    assert score_of(found({"toy": values}), "toy").metric == "accuracy,flexible"


@pytest.mark.parametrize("value", [None, "N/A", float("nan"), {"overall": 1}, True])
def test_a_task_without_a_number_is_refused_by_name(value):
    with pytest.raises(EarlyTomConfigError, match="'submission' of lvb_test.*longvideobench_val_v"):
        score_of(found({"lvb_test": {"submission,none": value}}, metric="submission"), "lvb_test")


def test_empty_answers_are_counted():
    samples = {
        "toy": [{"filtered_resps": answer} for answer in (["A"], ["  "], [[""]], [], "\n", "B")],
        "other": [{"no answers": 1}],
    }
    assert score_of(found({"toy": {"accuracy,none": 0.5}}, samples=samples), "toy").empty == 4


def test_lower_may_be_better():
    assert not score_of(found({"toy": {"accuracy,none": 0.5}}, better=False), "toy").higher_is_better


@examples(100)
@given(st.integers(1, 1000), st.data())
def test_shares_and_percentages_come_to_the_same(questions, data):
    full, cut = (data.draw(st.integers(0, questions)) / questions for _ in range(2))
    if max(100 * full, 100 * cut) <= 1:
        return  # less than one in a hundred: nobody can tell
    assert cut * unit_of(cut, full) == pytest.approx(100 * cut)
    assert 100 * cut * unit_of(100 * cut, 100 * full) == pytest.approx(100 * cut)
