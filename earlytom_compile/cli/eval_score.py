"""What lmms-eval found out about one task, as one number: which of its metrics, how sure, of how many questions.

    results["results"]["videomme"] = {"videomme_perception_score,none": 58.4, "…_stderr_clustered,none": 0.011, …}
    score_of(results, "videomme")   ->   Score("videomme_perception_score,none", 58.4, stderr=1.1, samples=2700, …)

Tasks disagree about what they call an accuracy and whether it is a share or a percentage; Table 1 has percentages.
"""

import hashlib
import math
import numbers
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import EarlyTomConfigError

_FILTER = "none"
"""lmms-eval's name for answers as they are; its metrics are called ``metric,filter``."""


@dataclass(frozen=True)
class Score:
    """The main metric of one task."""

    metric: str
    """As lmms-eval calls it: ``metric,filter``."""
    value: float
    """As lmms-eval gives it, a share or a percentage; of a group without a metric of its own, the plain mean."""
    stderr: float | None
    """Standard error in the unit of ``value``; None where lmms-eval gives none."""
    samples: int
    """Questions, over all subtasks."""
    empty: int
    """Answers without a letter: some tasks leave them out of their accuracy instead of counting them as wrong."""
    subtasks: tuple[str, ...] = ()
    """The tasks of a group, of which ``value`` is the mean."""
    higher_is_better: bool = True


def unit_of(value: float, full: float) -> float:
    """What ``value`` is multiplied with to be a percentage: 1, or 100 for a share. ``full``: the full model's.

    A share is at most 1. No task says which of the two it gives, so the larger value decides: a full model with less
    than one right answer in a hundred would be taken for a share.
    """
    return 1.0 if max(abs(value), abs(full)) > 1 else 100.0


def questions_of(results: Mapping[str, Any]) -> str:
    """A digest of what was asked, from lmms-eval's hashes of the documents; "" where it gives none."""
    samples = results.get("samples") or {}
    hashes = sorted(f"{task} {sample.get('doc_hash')}" for task, of_task in samples.items() for sample in of_task)
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest() if hashes else ""


def score_of(results: Mapping[str, Any], task: str) -> Score:
    """The score of ``task`` in what ``simple_evaluate`` returned for it alone.

    A task has the metric that its configuration names first. A group has the one that lmms-eval aggregates; else, as
    MVBench, the mean over its tasks, each with the same weight. Raises :class:`EarlyTomConfigError` where there is no
    number, as in tasks whose answers only a server can score.
    """
    found, leaves = results["results"], sorted(results["configs"])
    metric = _main_metric(results, leaves[0])
    samples = sum(int(counts["effective"]) for counts in results["n-samples"].values())
    better = results.get("higher_is_better", {}).get(leaves[0], {}).get(metric)
    beside: dict[str, Any] = {
        "samples": samples,
        "empty": _empty_answers(results.get("samples", {})),
        "subtasks": () if leaves == [task] else tuple(leaves),
        "higher_is_better": better is not False,
    }
    own = found.get(task, {})
    if (key := _key(own, metric)) is not None:
        return Score(key, float(own[key]), _stderr(own, key), **beside)
    keys = [_key(found[leaf], metric) for leaf in leaves]
    missing = [leaf for leaf, key in zip(leaves, keys, strict=True) if key is None]
    if missing:
        raise EarlyTomConfigError(
            f"lmms-eval gives no number for the metric {metric!r} of {missing[0]}, whose answers may only be for a "
            "server to score: take a task with answers, such as longvideobench_val_v for longvideobench_test_v."
        )
    named = [(found[leaf], key) for leaf, key in zip(leaves, keys, strict=True) if key is not None]
    return Score(named[0][1], statistics.fmean(own[key] for own, key in named), _stderr_of_mean(named), **beside)


def _main_metric(results: Mapping[str, Any], leaf: str) -> str:
    listed = results["configs"][leaf].get("metric_list") or []
    if listed:
        return str(listed[0]["metric"])
    names = [key.partition(",")[0] for key, value in results["results"][leaf].items() if _is_number(value)]
    if not names:
        raise EarlyTomConfigError(f"lmms-eval gives no number for {leaf}.")
    return str(names[0])


def _key(values: Mapping[str, Any], metric: str) -> str | None:
    """The key of ``metric`` that has a number, of unfiltered answers if there are such."""
    keys = [key for key, value in values.items() if key.partition(",")[0] == metric and _is_number(value)]
    plain = f"{metric},{_FILTER}"
    return plain if plain in keys else next(iter(keys), None)


def _stderr(values: Mapping[str, Any], key: str) -> float | None:
    """That of the metric itself; else lmms-eval's of right and wrong answers, which are ones and zeros, by video where
    questions share one."""
    metric, _, name = key.partition(",")
    percentage = 100.0 if values[key] > 1 else 1.0
    for kind, unit in (("stderr", 1.0), ("stderr_clustered", percentage), ("stderr_clt", percentage)):
        error: Any = values.get(f"{metric}_{kind},{name}")
        if _is_number(error):
            return unit * float(error)
    return None


def _stderr_of_mean(named: list[tuple[Mapping[str, Any], str]]) -> float | None:
    """Of the mean of independent numbers."""
    errors = [_stderr(values, key) for values, key in named]
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(known) if len(known) == len(errors) else None


def _empty_answers(samples: Mapping[str, Any]) -> int:
    answers = [sample.get("filtered_resps") for asked in samples.values() for sample in asked]
    return sum(1 for answer in answers if answer is not None and not _text(answer).strip())


def _text(answer: Any) -> str:
    return "".join(map(_text, answer)) if isinstance(answer, (list, tuple)) else str(answer)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
